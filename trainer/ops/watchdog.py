"""A watchdog that ends a process that hangs and writes the stack traces of its threads to a file.

If one rank hangs, the others wait for it in a collective. Each rank runs its own watchdog, so each writes its stacks.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.ops import peers

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
_POLL_SECONDS = 1.0  # a deadline that moves forward is noticed at most this much later
_SUSPENDED_SECONDS = 10.0  # a poll that is later than this says that the process was suspended
_END_SECONDS = 120.0  # after an error: the last rows of the log, and a checkpoint that is being written


class Watchdog:
    """Ends this process with EXIT_CODE if it does not reach the next call of `expect` in time.

    with Watchdog(folder, rank) as watchdog:
        watchdog.expect("step 1", 3600)
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank = folder / f"stacks-rank-{rank}.txt", rank
        self.activity, self.seconds, self.deadline = "", math.inf, math.inf
        self.wake = threading.Condition()
        self.closed = False

    def __enter__(self) -> "Watchdog":
        """Start watching."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching."""
        with self.wake:
            self.closed = True
            self.wake.notify()

    def expect(self, activity: str, seconds: float) -> None:
        """Give the activity that starts now at most `seconds` until the next call."""
        self.activity, self.seconds, self.deadline = activity, seconds, time.monotonic() + seconds

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Limit the time that the end of the surrounding `with` blocks takes after an error in this one."""
        try:
            yield
        except BaseException:
            peers.ending()
            self.expect("the end after an error", _END_SECONDS)
            raise

    def _watch(self) -> None:
        with self.wake:
            while (remaining := self.deadline - time.monotonic()) > 0:
                began = time.monotonic()
                self.wake.wait(min(remaining, _POLL_SECONDS))
                if self.closed:
                    return
                if (waited := time.monotonic() - began) > _POLL_SECONDS + _SUSPENDED_SECONDS:
                    self.deadline += waited  # all of the process was stopped, by Ctrl-Z or SLURM
        with self.path.open("w") as file:
            print(f"rank {self.rank} hung in {self.activity}; stacks of its threads:", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        message = f"{self.activity} has not ended after {self.seconds:g} s: stacks in {self.path}"
        print(f"error: rank {self.rank}: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
