"""The command line: the help of every verb, and one-line messages for user errors."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.data.images import write_folder
from trainer.__main__ import app, main

ROOT = Path(__file__).parents[2]


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of this command and of all its subcommands."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, (*path, name))


@pytest.mark.parametrize("words", list(verbs(typer.main.get_command(app))), ids=" ".join)
def test_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert " ".join(words) in result.output


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


def test_help_imports_nothing_heavy() -> None:
    result = run("-X", "importtime", "-m", "trainer", "--help")
    assert result.returncode == 0
    assert "pretrain" in result.stdout
    imported = {line.rsplit("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    for heavy in ("torch", "numpy", "cv2", "timm", "pydantic", "yaml", "plotly"):
        assert heavy not in imported


def test_no_verb_and_an_unknown_one() -> None:
    assert "Usage: " in CliRunner().invoke(app, []).output
    result = CliRunner().invoke(app, ["pretrian"])
    assert result.exit_code == 2
    assert "No such command 'pretrian'" in result.output


def test_a_mistake_is_one_line_before_the_trainer_is_imported() -> None:
    result = run("-X", "importtime", "-m", "trainer", "pretrain", "configs/demo.yaml", "optim.lrr=1")
    assert result.returncode == 1
    imports, _, error = result.stderr.partition("error: ")
    assert error == "configs/demo.yaml: optim.lrr: unknown key, did you mean optim.lr?\n"
    assert result.stdout == ""
    lines = imports.splitlines()
    assert all(line.startswith("import time:") for line in lines)
    imported = {line.rsplit("|")[-1].strip() for line in lines}
    assert "torch" in imported
    assert not imported & {"timm", "torchvision", "deepspeed", "trainer.pretrain"}


def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what `python -m trainer WORDS` writes to stderr when it fails."""
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["trainer", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    "words",
    [
        ("kernels", "--repeats", "0"),
        ("bank", "--steps", "0"),
        ("step", "configs/demo.yaml", "--repeats", "0"),
        ("data", "configs/demo.yaml", "--seconds", "0"),
        ("feed", "configs/demo.yaml", "--batch-size", "0"),
        ("traffic", "--ranks", "0"),
    ],
    ids=" ".join,
)
def test_numbers_of_nothing_are_refused(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2
    assert "Invalid value" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("scale", "submit", "configs/demo.yaml", "study", "--sizes", "2,0"),
            "error: --sizes: got 2,0, need numbers from 1 on, such as 1,2,4\n",
        ),
        (
            ("bench", "kernels", "--tune", "--out", "x.json"),
            "error: bench kernels: got --tune and --out, but --tune writes kernels/triton/tiles.csv only\n",
        ),
        (("pretrain", "nowhere.yaml"), "error: nowhere.yaml: No such file or directory\n"),
        (("doctor", "nowhere.yaml"), "error: nowhere.yaml: No such file or directory\n"),
        (("report", "nowhere"), f"error: {Path.cwd()}/nowhere is not a run: it has no config.yaml\n"),
        (("knn", "nowhere", "eval.k=20"), f"error: {Path.cwd()}/nowhere is not a run: it has no config.yaml\n"),
    ],
)
def test_bad_arguments_get_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert mistake(monkeypatch, capsys, *words) == message


def test_data_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "a.yaml"
    values = {"run": {"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"}, "data": {"train": "nowhere"}}
    config.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(ROOT)
    message = mistake(monkeypatch, capsys, "pretrain", str(config))
    assert message.startswith(f"error: data: {ROOT}/nowhere does not exist")
    assert message.count("\n") == 1
    assert CliRunner().invoke(app, ["doctor", str(config)]).exit_code == 1


def test_the_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["trainer", "pretrain", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ValueError, match="No such file"):
        main()


def test_home_directories_in_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shell leaves `~` in --out=~/x and in a quoted argument."""
    write_folder(tmp_path / "images", classes=2, per_class=1)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["trainer", "data", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(str(ended.value.code))

    assert call("verify", "~/images", "--out=~/a.npz") == 0
    assert call("verify", str(tmp_path / "images"), "--out", "~/b.npz") == 0
    assert call("index", "~/images", "~/c.npz") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"images", "a.npz", "b.npz", "c.npz"}
    assert call("index", "~nobody-here/x", "b.npz") == 1
    assert "error: there is no home directory ~nobody-here" in capsys.readouterr().err
