"""Data workers and the signals that their rank gets."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data import processes

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


@pytest.mark.parametrize("length", [150, pytest.param(80, marks=pytest.mark.slow)])
def test_a_long_tmpdir(tmp_path: Path, length: int) -> None:
    folder = tmp_path / ("x" * (length - len(str(tmp_path)) - 1))
    folder.mkdir()
    assert len(str(folder)) == length
    (tmp_path / "program.py").write_text(PROGRAM.replace("os.killpg(os.getpgrp(), signal.SIGTERM)", "print('asked')"))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder)}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["asked", "99"], done.stderr
    assert list(folder.iterdir()) == []


def test_a_long_tmpdir_and_no_other_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise PermissionError

    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 75)
    monkeypatch.setattr(processes, "get_temp_dir", refuse)
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"TMPDIR=/x+ is too long .* set one of at most 75 bytes"):
        processes.fork_server([])
    assert tempfile.gettempdir() == "/" + "x" * 75
