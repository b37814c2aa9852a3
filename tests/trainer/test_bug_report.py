"""The report for a bug: it has what is needed to understand a problem, and no names or paths of the user."""

import os
import pwd
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.trainer.small import small_config, write_images
from trainer.__main__ import app
from trainer.config_file import dump
from trainer.ops.bug_report import anonymize, bug_report

USER = pwd.getpwuid(os.getuid()).pw_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no space left at /home/jane/runs/x", "no space left at <path 1>"),
        ("'/data/Jane Doe/photos': 3 files", "<path 1>: 3 files"),
        ("~/runs/x and ../mine/y", "<path 1> and <path 2>"),
        ("from /d/a to /d/b, again /d/a", "from <path 1> to <path 2>, again <path 1>"),
        ("unreadable: jane_wedding/img-1.jpg: truncated", "unreadable: <path 1>: truncated"),
        ("see https://wandb.ai/jane/project/runs/1 now", "see <path 1> now"),
        (f"{USER}@{socket.gethostname()}: run of {USER}", "<user>@<host>: run of <user>"),
        ("2 nodes (gpu[017-018]) x 8 ranks; gpu018: disk", "2 nodes (<host>) x 8 ranks; <host>: disk"),
        ("rank 3 on node-a7 takes 2 s a step for 9 steps", "rank 3 on <host> takes 2 s a step for 9 steps"),
    ],
)
def test_names_and_paths_are_replaced(text: str, expected: str) -> None:
    assert anonymize(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "1,234 images/s, 3.1 GB/s and 50/50, and/or 2 of 3 nodes",
        "step 12: loss 0.5, learning rate 0.03 (1e-4 for 256) -> 0.1",
        "CPUHostAllocator / cuda:0, torch 2.14.1+cu130, version.py = x",
        "error: demo: bank.sizes: unknown key, did you mean bank.size?",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert anonymize(text) == text


def test_a_traceback_stays_readable() -> None:
    text = (
        'File "/home/jane/.venv/lib/python3.12/site-packages/torch/nn/modules/module.py", line 1, in call\n'
        'File "/home/jane/my job/code/trainer/engines/ddp.py", line 52, in student\n'
        'File "/usr/lib/python3.12/runpy.py", line 88\n'
    )
    shown = anonymize(text)
    assert "jane" not in shown
    for name in ("site-packages/torch/nn/modules/module.py", "trainer/engines/ddp.py", "python3.12/runpy.py"):
        assert name in shown


def test_the_report_of_a_run(tmp_path: Path) -> None:
    pictures = write_images(tmp_path / "secret")
    folder = tmp_path / "secret run"
    folder.mkdir()
    config = tmp_path / "mine.yaml"
    config.write_text(dump(small_config(folder, pictures)))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(9)))
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {i} of {folder}\n" for i in range(99)))
    result = CliRunner().invoke(app, ["doctor", str(config), "--report", "--log", str(log)])
    assert result.exit_code == 0
    for shown in ("Python 3.", "torch 2.", "driver: ", "batch_size: ", '{"step": 8}', "line 98 of <path"):
        assert shown in result.output
    for hidden in ("secret", str(tmp_path), f"{socket.gethostname()} ", "line 9 of"):
        assert hidden not in result.output


def test_a_configuration_that_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("run: {dir: x, epochs: 1}\ndata: {train: y}\nbank: {sizes: 3}\n")
    assert re.search(r"^error: <path \d>: bank\.sizes: unknown key", bug_report(config, [], None), re.M)
    assert "error:" in bug_report(tmp_path / "none.yaml", [], None)


def test_a_log_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bug_report(None, [], tmp_path / "none.log")
