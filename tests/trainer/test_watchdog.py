"""The watchdog ends a process that hangs, and only such a process."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from pathlib import Path
from trainer.ops.watchdog import Watchdog

def stuck_in_here():
    time.sleep(60)

with Watchdog(Path(sys.argv[1]), rank=3) as watchdog:
    for step in range(8):
        watchdog.expect(f"step {step + 1}", 2.0)
        time.sleep(0.3)  # the sum exceeds the limit, no single step does
    if sys.argv[2] == "hang":
        stuck_in_here()
time.sleep(2.5)
"""


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", PROGRAM, str(folder), how]
    return subprocess.run(program, capture_output=True, text=True, timeout=300)


def test_a_hung_process_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    done = run(tmp_path, "hang")
    assert done.returncode == 70
    stacks = tmp_path / "stacks-rank-3.txt"
    assert done.stderr == f"error: rank 3: step 8 has not ended after 2 s: stacks in {stacks}\n"
    assert "stuck_in_here" in stacks.read_text()


def test_one_that_moves_is_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "end").returncode == 0
    assert list(tmp_path.iterdir()) == []
