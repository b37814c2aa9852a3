"""Processes for tests, which a fork server that has imported torch starts in milliseconds."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from trainer.__main__ import main

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


def start_fork_server(folder: Path) -> None:
    """Start the server of all tests of this process, with a library in `folder` that fails reads on request.

    Who starts it decides what it imports: a loader's would have the ranks of later tests import torch and timm each for
    itself, for seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded"])
    source, library = folder / "broken.c", folder / "broken.so"
    if not shutil.which("gcc"):
        forkserver.ensure_running()
        return
    source.write_text(BROKEN_READS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    before = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{library}:{before}" if before else str(library)
    forkserver.ensure_running()
    if before is None:
        del os.environ["LD_PRELOAD"]
    else:
        os.environ["LD_PRELOAD"] = before


class Program:
    """A process that runs `function(*args)`, a function of a module, in the current folder.

    Attributes:
        process: The process, with `pid`.
    """

    def __init__(self, function: Callable[..., object], *args: Any, **environment: str) -> None:
        """Start the process, with `environment` on top of this process's variables."""
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        folder, variables = Path(self._folder.name), {**os.environ, **environment}
        self.process = context.Process(target=_run, args=(folder, os.getcwd(), variables, function, args))
        self.process.start()

    def wait(self, timeout: float = 300) -> int:
        """Return the exit code, which is negative after a signal, as that of `subprocess.Popen`."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still runs after {timeout} s: {self.errors}"
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def output(self) -> str:
        """Return what the process has written to stdout so far."""
        return Path(self._folder.name, "1").read_text()

    @property
    def errors(self) -> str:
        """Return what the process has written to stderr so far."""
        return Path(self._folder.name, "2").read_text()


def _run(
    folder: Path, current: str, variables: dict[str, str], function: Callable[..., object], args: tuple[Any, ...]
) -> None:
    for number in (1, 2):
        file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(current)
    os.environ.clear()
    os.environ.update(variables)
    function(*args)


def start_ranks(world_size: int, function: Callable[..., object], *args: Any, **environment: str) -> list[Program]:
    """Start a process for each rank of one machine, with torchrun's variables but without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    size = str(world_size)
    environment |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Program(function, *args, **environment, RANK=str(r), LOCAL_RANK=str(r)) for r in range(world_size)]


def trainer(*arguments: object) -> None:
    """Do what `python -m trainer ARGUMENTS` does."""
    sys.argv = ["trainer", *map(str, arguments)]
    main()
