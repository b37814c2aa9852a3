"""How a process ends early: in good order after a stop request, and at once after an error among several ranks.

Imports nothing outside of the standard library, because signals can come while torch is still being imported.
"""

import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, try again

_must_exit = False


class Stopped(BaseException):
    """The process was asked to stop early. Not an Exception, so that no library takes it for an error of its own."""


def exit_code() -> int:
    """Return the exit code of a process whose run has stopped.

    torchrun treats every code but 0 as a failure; under torchrun the file stopped.json carries the information.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_CODE


class StopSignals:
    """Raises Stopped in the main thread at the first SIGTERM or SIGUSR1 inside the `with` block.

    `trainer.ops.stop.StopHandler` replaces these handlers while a training loop runs. Signals are left alone in other
    threads than the main one, where Python does not allow handlers.

    Attributes:
        reason: The name of the signal, or the reason of a request; empty if there was none.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.reason = self.requested = ""
        self.earlier_handlers: dict[int, Any] = {}
        self.lock, self.closed = threading.Lock(), False

    def __enter__(self) -> "StopSignals":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self.earlier_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers."""
        with self.lock:
            self.closed = True
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def request(self, reason: str) -> None:
        """Stop the main thread for another reason than a signal. Called by another thread."""
        with self.lock:  # after the `with` block, the signal would meet another handler
            if not self.closed:
                self.requested = reason
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.reason:  # SLURM and torchrun may both send one, and the second must not disturb the end
            self.reason = self.requested or signal.Signals(number).name
            raise Stopped(f"stopped ({self.reason}): the same command starts again")


def exit_without_cleanup() -> None:
    """Make `end_process` exit at once, because the end of the interpreter would wait for other ranks or a thread."""
    global _must_exit
    _must_exit = True


def end_process(error: BaseException) -> None:
    """Exit as the interpreter would after `error`, but without waiting, if `exit_without_cleanup` was called."""
    if not _must_exit:
        return
    code: Any = 1
    if isinstance(error, SystemExit):
        code = error.code
    else:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk, or a closed stream
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
