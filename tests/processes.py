"""Processes for tests, which a fork server that has imported torch starts in milliseconds."""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.__main__ import main


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
        """What the process has written to stdout so far."""
        return Path(self._folder.name, "1").read_text()

    @property
    def errors(self) -> str:
        """What the process has written to stderr so far."""
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


def start_ranks(world_size: int, function: Callable[..., object], *args: Any) -> list[Program]:
    """Start a process for each rank of one machine, with torchrun's variables but without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Program(function, *args, **{key: str(value) for key, value in {**shared, "RANK": r, "LOCAL_RANK": r}.items()})
        for r in range(world_size)
    ]


def trainer(*arguments: object) -> None:
    """Do what `python -m trainer ARGUMENTS` does."""
    sys.argv = ["trainer", *map(str, arguments)]
    main()
