"""Ends a process that hangs: what it was doing goes to a file, so that nobody has to guess in the morning.

If one rank hangs, the others soon wait for it in a collective, so every rank leaves its stacks.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class Watchdog:
    """Ends this process with EXIT_CODE when `beat` has not been called for `seconds` (0: never).

    Until the first `beat` it allows `first_seconds`: networks are compiled and algorithms chosen then.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, first_seconds: float) -> None:
        self.path, self.rank, self.seconds = folder / f"stacks-rank-{rank}.txt", rank, seconds
        self.what = "the first step"
        self.until = time.monotonic() + first_seconds
        self.stopped = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, what: str) -> None:
        """Training moves; `what` comes next."""
        self.what, self.until = what, time.monotonic() + self.seconds

    def stop(self) -> None:
        self.stopped.set()

    def _watch(self) -> None:
        while (left := self.until - time.monotonic()) > 0:
            if self.stopped.wait(left):
                return
        with self.path.open("w") as file:
            print(f"rank {self.rank} hung in {self.what}; stacks of its threads:", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        message = f"error: rank {self.rank}: {self.what} has not ended after {self.seconds:g} s: stacks in {self.path}"
        print(message, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
