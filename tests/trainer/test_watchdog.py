"""The watchdog ends a process that hangs, and only such a process."""

import os
import signal
import time
from pathlib import Path

from tests.processes import Program
from trainer.ops import watchdog as watchdog_module
from trainer.ops.watchdog import Watchdog


def stuck_in_here() -> None:
    time.sleep(60)


def work(folder: Path, how: str) -> None:
    watchdog_module._SUSPENDED_SECONDS = 1.0
    with Watchdog(folder, rank=3) as watchdog:
        for step in range(8):
            watchdog.expect(f"step {step + 1}", 2.0)
            time.sleep(0.3)  # the sum exceeds the limit, no single step does
        if how == "suspended":
            watchdog.expect("a second of work", 2.0)
            (folder.parent / "begun").touch()
            end = time.process_time() + 1
            while time.process_time() < end:
                pass
        if how == "hang":
            stuck_in_here()
    time.sleep(2.5)


def test_a_hung_process_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    program = Program(work, tmp_path, "hang")
    assert program.wait() == 70
    stacks = tmp_path / "stacks-rank-3.txt"
    assert program.errors == f"error: rank 3: step 8 has not ended after 2 s: stacks in {stacks}\n"
    assert "stuck_in_here" in stacks.read_text()


def test_one_that_was_suspended_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    program = Program(work, tmp_path / "run", "suspended")
    while not (tmp_path / "begun").exists():
        time.sleep(0.1)
    assert program.process.pid
    os.kill(program.process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(program.process.pid, signal.SIGCONT)
    assert program.wait() == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_one_that_moves_is_left_alone(tmp_path: Path) -> None:
    assert Program(work, tmp_path, "end").wait() == 0
    assert list(tmp_path.iterdir()) == []
