"""What a trainer that gets no data waits for: which picture every worker is reading, said when it takes long."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.source import SharedArray, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 30.0  # seconds of waiting for a batch before the first line, and between lines
SLOTS = 4096  # threads of all workers of a rank
NAMED = 8  # readers named in a line


class Watched(Source):
    """The same source; which sample each thread of each process is reading, and since when, is in shared memory."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes = source.classes
        # Thread numbers are unique on a machine and mostly consecutive, so two hardly ever share a slot; if they do,
        # one of them is not named.
        self._reading = SharedArray(np.zeros((SLOTS, 2), np.int64))  # sample, and time.monotonic_ns or 0

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
