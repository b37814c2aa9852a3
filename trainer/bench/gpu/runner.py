"""`python -m trainer bench gpu`: checks and measures everything on a GPU, part by part, and writes a record.

Each part runs in a process of its own with a time limit, so one that crashes or hangs does not stop the next. Lines are
written as they come:

FOLDER/lines.jsonl    one comparison per line
FOLDER/record.json    the machine, the versions and all lines; rewritten after each part
FOLDER/PART.log       what the part printed, and its traceback if it failed

A part that runs again replaces its own lines once it has ended, unless the time for all parts cut it short. The record
keeps the lines of all other parts.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.markup import escape

from data.processes import fork_server
from trainer.bench.gpu.record import Line, Setting, skipped
from trainer.bench.harness import environment, print_rows
from trainer.run.files import read_json, write_atomically, write_json

RECORD, LINES = "record.json", "lines.jsonl"
NOTE = 60  # characters of a note in the table; the record has all
END_SECONDS = 10.0  # for a killed part to end


class Part(NamedTuple):
    """One part: its name, a function that yields lines as it measures, and its time limit in seconds."""

    name: str
    function: Callable[[Setting], Iterator[Line]]
    limit: float


def run(parts: list[Part], setting: Setting, seconds: float) -> bool:
    """Run parts one after the other and write the record, which keeps the lines of other parts.

    Args:
        parts: The parts in their order.
        setting: The device and the folder of the record.
        seconds: Time for all parts; those that it does not suffice for are skipped.

    Returns:
        Whether no line of these parts failed.

    Raises:
        ValueError: The record in the folder is of another device or of other versions.
    """
    setting.folder.mkdir(parents=True, exist_ok=True)
    record = {"device": device_name(setting.device), "versions": _versions(), **environment()}
    kept = _recorded_lines(setting.folder / RECORD, record)
    _write_lines(setting.folder / LINES, kept)
    found: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    for part in parts:
        rows = []
        began = time.monotonic()
        for line in run_part(part, setting, end - began):
            rows.append({"part": part.name, **line._asdict(), "seconds": round(time.monotonic() - began, 1)})
            with (setting.folder / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            text = f"{part.name}: {line.name}: {line.verdict}"
            Console().print(text, markup=False, highlight=False, soft_wrap=True)
        found += rows
        earlier = [row for row in kept if row["part"] == part.name]
        ran_out_of_time = any((row["name"], row["verdict"]) == ("time", "skipped") for row in rows)
        if not (earlier and ran_out_of_time):
            kept = [row for row in kept if row["part"] != part.name] + rows
        write_json(setting.folder / RECORD, {**record, "lines": kept})
        _write_lines(setting.folder / LINES, kept)
    report(record["device"], found)
    Console().print(f"The record is {setting.folder / RECORD}", markup=False, highlight=False, soft_wrap=True)
    return not any(row["verdict"] == "failed" for row in found)


def _recorded_lines(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of an earlier record; none if there is no file."""
    if not path.exists():
        return []
    earlier = read_json(path)
    for key in ("device", "versions", "torch"):
        if earlier.get(key) != record[key]:
            raise ValueError(
                f"{path} has {key} {earlier.get(key)}, this machine {record[key]}: give another --out, or delete it"
            )
    lines: list[dict[str, Any]] = earlier["lines"]
    return lines


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def run_part(part: Part, setting: Setting, left: float) -> Iterator[Line]:
    """Run a part in a process of its own and yield its lines as they come, and one more if it does not end well.

    Args:
        part: The part.
        setting: The device and the folder of the record.
        left: Seconds until the time for all parts is over. A part that this cuts short is skipped; one that exceeds
            its own limit has failed.
    """
    alone = f"--parts {part.name} runs it alone"
    if left <= 0:
        yield skipped("time", f"no time is left: {alone}")
        return
    context = fork_server(["trainer.bench.gpu.parts"])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, setting, writer), name=part.name)
    process.start()
    writer.close()
    limit = min(part.limit, left)
    end, in_time = time.monotonic() + limit, True
    try:
        while in_time := reader.poll(max(0.0, end - time.monotonic())):
            yield reader.recv()
    except (EOFError, OSError):  # the process has ended, perhaps in the middle of a line
        process.join(END_SECONDS)
    finally:
        _kill(process)
    log = setting.folder / f"{part.name}.log"
    if not in_time and left < part.limit:
        yield skipped("time", f"the time for all parts was over after {left:.0f} s of this one: {alone}")
    elif not in_time:
        yield Line("time", "failed", limit, limit, "s", f"still running, killed; see {log}")
    elif process.exitcode != 0:
        yield Line("end", "failed", note=f"{_cause(process.exitcode)}: {_last_line(log)}")


def _work(part: Part, setting: Setting, writer: Connection) -> None:
    """Run a part, in its own process."""
    os.setsid()  # so that its descendants can be killed with it
    log = os.open(setting.folder / f"{part.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for line in part.function(setting):
        writer.send(line)
    sys.stdout.flush()


def _kill(process: BaseProcess) -> None:
    """Kill a part and its descendants, which may have outlived it."""
    assert process.pid is not None
    descendants = _descendants(process.pid)
    process.kill()
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.join(END_SECONDS)


def _descendants(part: int) -> list[psutil.Process]:
    """Return the processes of a part's session and their descendants, since torchrun gives its ranks own sessions."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):  # it has just ended
            if os.getsid(process.pid) == part:
                found += [process, *process.children(recursive=True)]
    return found


def _cause(exit_code: int | None) -> str:
    if exit_code is None:
        return "does not end even when killed"
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _versions() -> dict[str, str | None]:
    """Return the versions of what the step uses and is installed; torch's is in the environment."""
    found = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    for name in ("triton", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "deepspeed"):
        with suppress(ModuleNotFoundError):
            found[name] = version(name)
    return found


def report(device: str, rows: list[dict[str, Any]]) -> None:
    """Print the lines as a table, and how many there are of each verdict."""
    colours = {"passed": "green", "failed": "red", "slow": "yellow", "skipped": "dim"}
    print_rows(
        f"bench gpu on {device}",
        {
            "part": lambda row: row["part"],
            "": lambda row: row["name"],
            "verdict": lambda row: f"[{colours[row['verdict']]}]{row['verdict']}[/]",
            "note": lambda row: escape(row["note"][:NOTE]),
            "value": lambda row: _number(row["value"], row["unit"]),
            "bound": lambda row: _number(row["bound"], row["unit"]),
        },
        rows,
        text_columns=4,
    )
    for row in rows:
        if row["verdict"] == "failed":
            text = f"{row['part']}: {row['name']}: failed: {row['note']}"
            Console().print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    counts = Counter(row["verdict"] for row in rows)
    Console().print(", ".join(f"{counts[verdict]} {verdict}" for verdict in colours), highlight=False)


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".strip()
