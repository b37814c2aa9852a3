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

from tests.trainer.small import PYTHON
from trainer.__main__ import main

NOBODY = 65534

# Fails reads, with EIO, of files whose path contains the text in BROKEN_READS.
BROKEN_READS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t read(int file, void *buffer, size_t count) {
    static ssize_t (*original)(int, void *, size_t);
    if (!original) original = dlsym(RTLD_NEXT, "read");
    char link[64], path[4096];
    const char *broken = getenv("BROKEN_READS");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = broken ? readlink(link, path, sizeof path - 1) : -1;
    if (length > 0) {
        path[length] = 0;
        if (strstr(path, broken)) { errno = EIO; return -1; }
    }
    return original(file, buffer, count);
}
"""


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


def build_broken_reads(folder: Path) -> Path:
    """Compile the library that fails reads."""
    source, library = folder / "broken.c", folder / "broken.so"
    source.write_text(BROKEN_READS)
    if not shutil.which("gcc"):
        pytest.skip("gcc is not on PATH")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


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


def subprocess_command(*arguments: object, ranks: int = 1, **environment: str) -> tuple[int, str]:
    """Run `python -m trainer` in a process of its own, or under torchrun; see `command`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    line = [PYTHON, *launcher, "-m", "trainer", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=variables)
    return ended.returncode, ended.stderr


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
