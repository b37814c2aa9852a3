"""Part of a data set: chosen by a list of names, or by lot with as many of each class."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.random import SUBSET, hash_counters
from data.sources.base import SharedArray, Source


class Subset(Source):
    """Some samples of another source, with all its classes; sample i is its sample `samples[i]`."""

    def __init__(self, source: Source, samples: NDArray[np.int64]) -> None:
        self.source, self.classes = source, source.classes
        self._samples = SharedArray(samples)

    @property
    def samples(self) -> NDArray[np.int64]:
        """int64 [n], numbers in the whole source."""
        return self._samples.array

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self.source.labels[self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        return self.source.name(int(self.samples[i]))

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        return self.source.read(int(self.samples[i]))


def balanced(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """The sorted numbers of round(fraction * n) of n samples, int64, as equally many of each class as can be.

    Drawn by a hash of (seed, sample): the first of each class, then the second of each, and so on; where the last round
    does not reach all classes it goes by a hash of the class, and a class that has no more gives way to the others. So
    a smaller share is part of a larger one of the same seed.
    """
    numbers = np.arange(len(labels))
    shuffled = np.argsort(hash_counters(seed, SUBSET, 0, numbers))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # within a class as shuffled
    sizes = np.bincount(labels)
    turn = np.empty(len(labels), np.int64)
    turn[by_class] = numbers - np.repeat(np.cumsum(sizes) - sizes, sizes)
    order = np.lexsort((hash_counters(seed, SUBSET, 1, np.arange(len(sizes)))[labels], turn))
    return np.sort(order[: round(fraction * len(labels))]).astype(np.int64)


def named(source: Source, names: list[str], origin: Path) -> NDArray[np.int64]:
    """The sorted numbers of the samples that are called so, int64: by the whole name or its last part (n0_1.JPEG).

    Raises ValueError, naming `origin`, where a name is not there, is there twice, or stands for several samples.
    """
    places: dict[str, int] = {}
    twice = set()
    for i in range(len(source)):
        name = source.name(i)
        for key in {name, os.path.basename(name)}:
            if key in places:
                twice.add(key)
            places[key] = i
    missing = [name for name in names if name not in places]
    if missing:
        raise ValueError(
            f"{origin}: {len(missing):,} of {len(names):,} names are not in the data, such as {missing[0]}"
        )
    if several := [name for name in names if name in twice]:
        raise ValueError(f"{origin}: {several[0]} stands for several pictures: give names with their folders")
    numbers = np.array(sorted({places[name] for name in names}), np.int64)
    if len(numbers) < len(names):
        raise ValueError(f"{origin}: {len(names) - len(numbers)} of its {len(names)} lines are there twice")
    return numbers


def read_names(path: Path) -> list[str]:
    """The lines of a list of names. Raises ValueError if it is empty."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    names = [line.rstrip("\r") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} has no names in it")
    return names
