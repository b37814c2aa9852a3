"""Ends a process that hangs: what it was doing goes to a file, so that nobody has to guess in the morning.

If one rank hangs, the others soon wait for it in a collective, so every rank leaves its stacks.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
_LOOK = 1.0  # seconds: limits that get shorter are seen this much later


class Watchdog:
    """Ends this process with EXIT_CODE when what it was told to `expect` takes too long.

    with Watchdog(folder, rank) as watchdog:
        watchdog.expect("step 1", 3600)
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank = folder / f"stacks-rank-{rank}.txt", rank
        self.what, self.seconds, self.until = "", math.inf, math.inf
        self.changed = threading.Condition()
        self.over = False

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with self.changed:
            self.over = True
            self.changed.notify()

    def expect(self, what: str, seconds: float) -> None:
        """From now on the process does `what`, for at most `seconds`, or until the next call."""
        self.what, self.seconds, self.until = what, seconds, time.monotonic() + seconds

    def _watch(self) -> None:
        with self.changed:
            while (left := self.until - time.monotonic()) > 0:
                self.changed.wait(min(left, _LOOK))
                if self.over:
                    return
        with self.path.open("w") as file:
            print(f"rank {self.rank} hung in {self.what}; stacks of its threads:", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        message = f"error: rank {self.rank}: {self.what} has not ended after {self.seconds:g} s: stacks in {self.path}"
        print(message, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
