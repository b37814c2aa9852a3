"""The text that a bug report needs, ready to paste: versions, driver, settings and the last lines of the log.

It contains no names or paths of the user. A path becomes <path 1>, <path 2>, …, the same one for the same path; paths
of Python files become relative to the package. User, machine and cluster nodes become <user> and <host>.
"""

import os
import platform
import pwd
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from trainer.config import Config
from trainer.config_file import dump, flatten, load
from trainer.ops.doctor import run_checks
from trainer.ops.install import REQUIREMENTS, version_of

LINES = 40  # of the log
ROWS = 5  # of metrics.jsonl
VARIABLES = ("NCCL_", "GLOO_", "TORCH", "PYTORCH_", "PET_", "CUDA_", "OMP_", "DS_", "TRAINER_", "TRITON_", "SLURM_N")
PATH_KEYS = ("run.dir", "data.train", "data.val", "model.weights", "monitor.wandb", "monitor.prometheus")
CODE = re.compile(
    r"(?<![^\s'\"])[~/][^'\"\n]*/((?:site-packages|python3\.\d+|trainer|models|data|kernels)/[\w./-]+\.py)\b"
)
PATH = re.compile(
    r"""(?x)
    (?P<quote>['"]) [~/] [^'"\n]* (?P=quote)                  # quoted, so that it may contain spaces
    | https?://\S+
    | (?<![\w.<>/~-]) (?: ~ | \.{0,2} / ) [^\s'"`,;:()\[\]{}|]*\w[^\s'"`,;:()\[\]{}|]*
    | (?<![\w./<-]) (?: [\w.+-]+ / )+ [\w+-]* \. \w+          # relative, with an extension
    | (?<![\w./<-]) [\w.+-]+ \. (?i:jpe?g|png|webp|bmp|tiff?|gif|tar|parquet|arrow|ya?ml|npz)\b
    """
)


def bug_report(path: Path | None, overrides: list[str], log: Path | None) -> str:
    """Return the report as Markdown, without names and paths of the user.

    Args:
        path: Configuration file. If its run directory exists, the report has the last rows of its metrics.
        overrides: Settings that replace those of the file.
        log: Output of the program, such as a job's log.

    Raises:
        OSError: `log` cannot be read.
    """
    config, settings = None, "none"
    if path:
        try:
            config = load(path, overrides)
            settings = dump(config)
        except (ValueError, OSError) as error:
            settings = f"error: {error}"
    parts = {"Machine": "\n".join(_machine(config)), "Packages": ", ".join(_packages()), "Settings": settings}
    if config:
        parts["Last rows of metrics.jsonl"] = _tail(Path(config.run.dir) / "metrics.jsonl", ROWS)
        parts["stopped.json"] = _tail(Path(config.run.dir) / "stopped.json", ROWS)
    if log:
        log.stat()  # raises OSError if there is none
        parts["Log"] = _tail(log, LINES)
    text = "\n\n".join(f"**{name}**\n```\n{part.strip()}\n```" for name, part in parts.items() if part)
    return anonymize(text, config)


def anonymize(text: str, config: Config | None = None) -> str:
    """Replace paths, and the names of the user, of this machine and of the job's nodes.

    Args:
        text: Any text.
        config: A configuration, whose paths need not look like paths.
    """
    numbers: dict[str, str] = {}

    def number(path: str) -> str:
        return numbers.setdefault(path.strip("'\""), f"<path {len(numbers) + 1}>")

    text = CODE.sub(r"\1", text)
    values = flatten(config.model_dump(mode="json")) if config else {}
    known = {str(value) for key, value in values.items() if value and (key in PATH_KEYS or "/" in str(value))}
    for value in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(value)}(?![\w-])", number(value), text)
    text = PATH.sub(lambda found: found[0] if _is_ours(found[0]) else number(found[0]), text)
    for pattern in _hosts(text):
        text = re.sub(rf"(?<![\w<-]){pattern}(?![\w-])", "<host>", text)
    for name in _user_names():
        text = re.sub(rf"(?<![\w<-]){re.escape(name)}(?![\w>-])", "<user>", text)
    return text


def _is_ours(path: str) -> bool:
    """Whether it is a file of the program or of a Python package, as `CODE` leaves them."""
    return path.endswith(".py") and not path.startswith(("/", "~", ".", "'", '"'))


def _hosts(text: str) -> Iterator[str]:
    """Return patterns of machine names: of this machine, and of the nodes that SLURM or the log names."""
    name = socket.gethostname()
    yield from (re.escape(each) for each in {name, name.split(".")[0]} if each)
    lists = [os.environ.get("SLURM_JOB_NODELIST", ""), *re.findall(r"nodes \((\S+?)\)", text)]
    for prefix in set(re.findall(r"([A-Za-z][A-Za-z-]*)[\d\[]", " ".join(lists))):
        yield rf"{re.escape(prefix)}[\d\[][\w\[\],.-]*"
    yield r"(?<=on )[A-Za-z][\w.-]*\d(?= takes)"


def _user_names() -> Iterator[str]:
    """Return the login and full name of the user, if they have one."""
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        return
    yield from (name for name in (entry.pw_gecos.split(",")[0], entry.pw_name) if len(name) > 1)


def _machine(config: Config | None) -> Iterator[str]:
    yield f"Python {platform.python_version()}, {platform.platform()}"
    for check in run_checks(config):
        yield f"{check.state:8}{check.name}: {check.detail}"
    for key, value in sorted(os.environ.items()):
        if key.startswith(VARIABLES) and "NODELIST" not in key and "TOKEN" not in key and "KEY" not in key:
            yield f"{key}={value}"


def _packages() -> Iterator[str]:
    """Return the installed packages that the requirement files name, with versions."""
    lines = {line for file in REQUIREMENTS.glob("*.txt") for line in file.read_text(encoding="utf-8").splitlines()}
    for name in sorted(re.split(r"[=>]", line)[0] for line in lines if ">=" in line):
        if version := version_of(name):
            yield f"{name} {version}"


def _tail(path: Path, lines: int) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
