"""Faults of real file systems for tests: a disk that fills up, another user, and reads that fail with EIO."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.processes import start_ranks, trainer
from trainer.__main__ import main

NOBODY = 65534


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mount a file system of `kib` KiB at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=777", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Fill the disk until `free` bytes are left; returns the file that fills it."""
    path = disk / "ballast"
    path.unlink(missing_ok=True)
    space = shutil.disk_usage(disk).free
    path.write_bytes(bytes(max(0, space - free)))
    return path


def command(*arguments: object) -> tuple[int, str]:
    """Run `python -m trainer` in this process; returns the exit code and what it wrote to stderr."""
    errors, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(errors), redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, errors.getvalue()


def ranks_command(*arguments: object, ranks: int = 1, **environment: str) -> tuple[int, str]:
    """Run `python -m trainer` in a process for each rank; see `command`. BROKEN_READS: a file that cannot be read."""
    if "BROKEN_READS" in environment and not shutil.which("gcc"):
        pytest.skip("gcc is not on PATH")
    programs = start_ranks(ranks, trainer, *arguments, **environment)
    codes = {program.wait() for program in programs}
    return max(codes), "".join(program.errors for program in programs)


@contextmanager
def user(number: int = NOBODY) -> Iterator[None]:
    """Access files as another user, also in processes that are started meanwhile."""
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
