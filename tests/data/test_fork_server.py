"""Data workers and the signals that their rank gets."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, time
from data.loader import iterate

class Numbers:
    def __getitem__(self, i):
        return i

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: print("asked"))
    numbers = iterate(Numbers(), range(100), 1, 1, False)
    next(numbers)
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(0.5)
    print(sum(1 for _ in numbers))
"""


def test_a_signal_to_the_process_group_does_not_reach_the_workers(tmp_path: Path) -> None:
    """torchrun sends such a signal, and the rank still needs its workers to complete the step."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, start_new_session=True)
    assert done.stdout.split() == ["asked", "99"], done.stderr
