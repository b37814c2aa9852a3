"""Every command in README and docs is one that is understood; what can run here in seconds runs, on a small run."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner

from tests.trainer.small import small_config, write_images
from trainer.__main__ import app
from trainer.config_file import dump, load
from trainer.pretrain import pretrain

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = ["python", "-m", "trainer"]
# What makes a run of any configuration take seconds.
SMALL = [
    *("data.batch_size=12", "data.workers=0", "run.epochs=1", "run.device=cpu", "optim.warmup=0", "eval.knn_every=1"),
    *("model.backbone=resnet18", "model.backbone_args={channels: [8, 8, 8, 16]}", "model.dim=16", "bank.size=30"),
    *("data.views=[{size: 16}, {size: 16}]", "eval.k=5"),
]
# Verbs that have tests of their own, with settings that take seconds.
ELSEWHERE = {
    "bench": "test_bench_*.py",
    "plan": "test_plan*.py",
    "scale": "test_scale.py",
    "replay": "test_replay.py",
    "doctor": "test_doctor.py",
    "linear": "test_linear.py",
    "finetune": "test_finetune.py",
    "voc07": "test_voc07.py",
}


class Command(NamedTuple):
    """words: without comment. whole: as it would be typed, not in the middle of a sentence or with words left out."""

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        lines = [(line, True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [(" ".join(code.split()), False) for code in re.findall(r"`([^`]+)`", text)]
        for line, whole in lines:
            if whole or re.match(r"(python -m trainer|torchrun|sbatch|make|slurm/\w+\.sh) ", line):
                words = shlex.split(line, comments=True)
                if words:
                    said = tuple(word for word in words if "…" not in word)
                    yield Command(str(page.relative_to(ROOT)), said, whole and len(said) == len(words))


def write_examples(folder: Path) -> None:
    """Write the files of docs/extend.md, each of which begins with its name."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page, re.M | re.S):
        (folder / name).write_text(text, encoding="utf-8")


COMMANDS = list(dict.fromkeys(commands()))
TRAINER = [command for command in COMMANDS if "trainer" in command.words]
OTHERS = [command for command in COMMANDS if command.words[0] in ("make", "sbatch") or "slurm/" in command.words[0]]


def trainers(command: Command) -> list[str]:
    """The words after `-m trainer`."""
    return list(command.words[command.words.index("trainer") + 1 :])


@pytest.mark.parametrize("command", TRAINER, ids=str)
def test_it_is_understood(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    found: Any = typer.main.get_command(app)
    words = trainers(command)
    while hasattr(found, "commands"):
        assert words, "a verb is missing"
        assert words[0] in found.commands, f"there is no verb {words[0]}"
        found, words = found.commands[words[0]], words[1:]
    if not command.whole:
        options = {option for each in found.params for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in words if word.startswith("--") and "=" not in word} <= options
        return
    with found.make_context("", words) as context:
        config, overrides = context.params.get("config"), context.params.get("overrides") or []
    if config is not None and str(config).startswith("configs/"):
        load(ROOT / config, overrides)


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_what_it_names_is_there(command: Command) -> None:
    words = list(command.words)
    scripts = [word for word in words if word.startswith("slurm/")]
    if words[0] == "make":
        for target in (word for word in words[1:] if "=" not in word and not word.startswith("-")):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    for script in scripts:
        text = (ROOT / script).read_text()
        if command.whole and (default := re.search(r"CONFIG=\$\{CONFIG:-(.*?)\}", text)):
            load(ROOT / default[1], [word for word in words[words.index(script) + 1 :] if "=" in word])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a finished run on them of torchvision's ResNet-18, and a checkpoint of MoCo's code."""
    folder = tmp_path_factory.mktemp("docs")
    model = {"backbone": "resnet18", "backbone_args": {}, "dim": 16}
    config = small_config(folder / "run", write_images(folder / "images"), run={"epochs": 1}, model=model)
    (folder / "small.yaml").write_text(dump(config))
    pretrain(load(folder / "small.yaml"))
    network = timm.create_model("resnet18", num_classes=0)
    tensors = {f"module.encoder_q.{name}": x for name, x in network.state_dict().items()}
    torch.save({"arch": "resnet18", "state_dict": tensors}, folder / "checkpoint.pth.tar")
    return folder


RUN = [
    command
    for command in TRAINER
    if command.whole and "torchrun" not in command.words and trainers(command)[0] not in ELSEWHERE
]


@pytest.mark.parametrize("command", RUN, ids=str)
def test_it_runs(command: Command, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = small_run / "images"
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "SRC").symlink_to(images)
    write_examples(tmp_path)
    words = [re.sub(r"/data/[\w/]+", str(images), word) for word in trainers(command)]
    for before, word in zip(["", *words], words, strict=False):
        if (word == "RUN" or word.startswith("runs/")) and before != "--out":
            shutil.copytree(small_run / "run", tmp_path / word)
        if word.endswith(".pth.tar"):
            (tmp_path / word).symlink_to(small_run / "checkpoint.pth.tar")
    if any(word.startswith("configs/") for word in words):
        given = {word.split("=")[0] for word in words}
        small = [f"data.train={images}", f"data.val={images}", *SMALL]
        words += [setting for setting in small if setting.split("=")[0] not in given]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_the_others_have_tests_of_their_own() -> None:
    for name, pattern in ELSEWHERE.items():
        assert any(f'"{name}"' in path.read_text() or name in path.name for path in (ROOT / "tests").rglob(pattern))


def test_mistakes_are_told_as_the_readme_shows() -> None:
    shown = re.findall(r"^\$ (python -m trainer .*)\n(error: .*)", (ROOT / "README.md").read_text(), re.M)
    assert shown
    for command, answer in shown:
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(command)[3:]]
        error = CliRunner().invoke(app, words).exception
        assert isinstance(error, ValueError)
        assert f"error: {error}".replace(f"{ROOT}/", "") == answer
