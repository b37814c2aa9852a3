"""Supervision between the training process and its data workers.

While the training process waits for data, a log line names the image that each worker is reading. A worker ends when
its training process is gone.
"""

import functools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.sources.base import SharedArray, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 30.0  # seconds of waiting for a batch before the first log line, and between lines
SLOTS = 4096  # for the threads of all workers of a rank
MAX_NAMED = 8  # images named in a log line
_OPEN: list[Connection] = []  # writing ends of pipes, open until the process ends


class WatchedSource(Source):
    """A source that records in shared memory which image each thread of each process is reading, and since when.

    A process that receives a copy ends when the process that created the source is gone. A killed training process
    cannot end its workers, which would hold memory indefinitely; torch's own check is of the parent, which is the fork
    server, and that lives as long as a worker does.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes = source.classes
        # Thread ids are unique on a machine and mostly consecutive, so two threads hardly ever share a slot; if they
        # do, the log names one of them.
        self._reading = SharedArray(np.zeros((SLOTS, 2), np.int64))  # index of the image; time.monotonic_ns() or 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": _lifeline()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trainer = state.pop("_trainer")
        self.__dict__.update(state)
        threading.Thread(target=_exit_after, args=(trainer,), daemon=True).start()

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each image, an index into `classes`: int64 [n]."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """Return the name of image i."""
        return self.source.name(i)

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Return image i as it is stored, and record the read. Raises UnreadableImage."""
        slot = self._reading.array[threading.get_native_id() % SLOTS]
        slot[:] = i, time.monotonic_ns()
        try:
            return self.source.read(i)
        finally:
            slot[1] = 0

    def active_reads(self) -> list[tuple[float, str]]:
        """Return duration in seconds and image name of each read in progress, the longest first."""
        reading = self._reading.array.copy()
        now = time.monotonic_ns()
        durations = sorted((now - start, sample) for sample, start in reading[reading[:, 1] > 0].tolist())
        return [(1e-9 * duration, self.name(sample)) for duration, sample in reversed(durations)]

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, and log what is being read while the next one takes longer than PATIENCE.

        A ValueError of a worker is raised with its own message; DataLoader replaces that by a traceback.
        """
        waiting: list[float] = []  # the time at which the wait began; empty between waits
        done = threading.Event()
        threading.Thread(target=self._log_waits, args=(waiting, done), daemon=True).start()
        try:
            while True:
                waiting.append(time.monotonic())
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except ValueError as error:
                    raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
                finally:
                    waiting.clear()
                yield batch
        finally:
            done.set()

    def _log_waits(self, waiting: list[float], done: threading.Event) -> None:
        logged = 0.0
        while not done.wait(PATIENCE / 10):
            now = time.monotonic()
            began = next(iter(waiting), now)
            if now - max(began, logged) > PATIENCE:
                logged = now
                log.warning("waiting for data for %.0f s; %s", now - began, self._describe_reads())

    def _describe_reads(self) -> str:
        reads = [f"{name} (for {seconds:.0f} s)" for seconds, name in self.active_reads()]
        if not reads:
            return "no file is being read: decoding or augmentation is slow, or a worker has died"
        more = f" and {len(reads) - MAX_NAMED} more" if len(reads) > MAX_NAMED else ""
        return f"reading {', '.join(reads[:MAX_NAMED])}{more}"


@functools.cache
def _lifeline() -> Connection:
    """Return the reading end of a pipe whose writing end is open as long as this process lives.

    A worker that reads it sees the end of a killed process at once, even if nobody collects its exit status (in a
    container whose first process is no init), and cannot mistake another process for it.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    _OPEN.append(writer)
    return reader


def _exit_after(trainer: Connection) -> None:
    """End this process once the one at the other end of the pipe is gone."""
    with suppress(EOFError, OSError):
        trainer.recv_bytes()
    os._exit(1)
