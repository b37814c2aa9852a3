"""Trainer and data workers keep an eye on each other.

A trainer that gets no data says which picture every worker is reading. A worker whose trainer is gone ends.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.sources.base import SharedArray, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 30.0  # seconds of waiting for a batch before the first line, and between lines
SLOTS = 4096  # threads of all workers of a rank
NAMED = 8  # readers named in a line
ORPHANED = 2.0  # seconds, at most, that a worker outlives its trainer


class Watched(Source):
    """The same source; which sample each thread of each process is reading, and since when, is in shared memory.

    A process that it is sent to ends when the one that made it is gone: killed, a trainer cannot end its workers,
    and they would hold memory until somebody finds them. torch's own check is of the parent, which is the fork server.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes = source.classes
        # Thread numbers are unique on a machine and mostly consecutive, so two hardly ever share a slot; if they do,
        # one of them is not named.
        self._reading = SharedArray(np.zeros((SLOTS, 2), np.int64))  # sample, and time.monotonic_ns or 0
        self._trainer = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != self._trainer:
            threading.Thread(target=_end_after, args=(self._trainer,), daemon=True).start()

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """What to call sample i in messages."""
        return self.source.name(i)

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Sample i as it is stored. Raises UnreadableImage."""
        slot = self._reading.array[threading.get_native_id() % SLOTS]
        slot[:] = i, time.monotonic_ns()
        try:
            return self.source.read(i)
        finally:
            slot[1] = 0

    def readers(self) -> list[tuple[float, str]]:
        """Seconds since it began, and name of the sample, of every read that is under way; the longest first."""
        reading = self._reading.array.copy()
        now = time.monotonic_ns()
        since = sorted((now - start, sample) for sample, start in reading[reading[:, 1] > 0].tolist())
        return [(1e-9 * age, self.name(sample)) for age, sample in reversed(since)]

    def batches(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches. While one is waited for longer than PATIENCE, a log line says what is being read.

        A worker's ValueError is one here too: DataLoader makes its message a traceback.
        """
        waiting: list[float] = []  # since when, if at all
        done = threading.Event()
        threading.Thread(target=self._tell, args=(waiting, done), daemon=True).start()
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

    def _tell(self, waiting: list[float], done: threading.Event) -> None:
        told = 0.0
        while not done.wait(PATIENCE / 10):
            now = time.monotonic()
            since = next(iter(waiting), now)
            if now - max(since, told) > PATIENCE:
                told = now
                log.warning("waiting for data since %.0f s; %s", now - since, self._described())

    def _described(self) -> str:
        readers = [f"{name} (since {seconds:.0f} s)" for seconds, name in self.readers()]
        if not readers:
            return "no file is being read: decoding or augmentation is slow, or a worker is gone"
        more = f" and {len(readers) - NAMED} more" if len(readers) > NAMED else ""
        return f"being read: {', '.join(readers[:NAMED])}{more}"


def _end_after(process: int) -> None:
    while True:
        time.sleep(ORPHANED)
        try:
            os.kill(process, 0)  # sends nothing
        except ProcessLookupError:
            os._exit(1)
