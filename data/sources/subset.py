"""A part of a data set: named images, or a random part with as many images of each class."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.names import from_text, read_lines, to_text
from data.random import SUBSET, hash_counters
from data.sources.base import SharedArray, Source


class Subset(Source):
    """Some images of another source, with all of its classes."""

    def __init__(self, source: Source, samples: NDArray[np.int64]) -> None:
        self.source, self.classes = source, source.classes
        self._samples = SharedArray(samples)

    @property
    def samples(self) -> NDArray[np.int64]:
        """The index of each image in the other source: int64 [n]."""
        return self._samples.array

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each image, an index into `classes`: int64 [n]."""
        return self.source.labels[self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        """Return the name of image i."""
        return self.source.name(int(self.samples[i]))

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Return image i as it is stored. Raises UnreadableImage."""
        return self.source.read(int(self.samples[i]))


def draw_balanced(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Draw images with as equal numbers per class as possible.

    Images are ordered by a hash of (seed, image). The first of each class is drawn, then the second of each, and so on.
    If the last round cannot include all classes, a hash of the class decides; classes without further images are
    skipped. So a smaller fraction is part of a larger one with the same seed.

    Args:
        labels: Label of each image, int64 [n].
        fraction: Share of the images to draw.
        seed: Seed of the hashes.

    Returns:
        Sorted indices, int64 [round(fraction * n)].
    """
    samples = np.arange(len(labels))
    shuffled = np.argsort(hash_counters(seed, SUBSET, 0, samples))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # in shuffled order within a class
    sizes = np.bincount(labels)
    drawn_in = np.empty(len(labels), np.int64)  # the round in which an image is drawn
    drawn_in[by_class] = samples - np.repeat(np.cumsum(sizes) - sizes, sizes)
    order = np.lexsort((hash_counters(seed, SUBSET, 1, np.arange(len(sizes)))[labels], drawn_in))
    return np.sort(order[: round(fraction * len(labels))]).astype(np.int64)


def find_named(source: Source, names: list[str], origin: Path) -> NDArray[np.int64]:
    """Find images by their whole name or its last part, such as n0_1.JPEG.

    Args:
        source: The images.
        names: The names to find, as text (see `data.names`) or as they are.
        origin: The file that lists the names, for messages.

    Returns:
        Sorted indices, int64.

    Raises:
        ValueError: A name is missing in the source, occurs twice in the list, or matches several images.
    """
    index: dict[str, int] = {}
    ambiguous = set()
    for i in range(len(source)):
        name = source.name(i)
        for key in {name, os.path.basename(name)}:
            if key in index:
                ambiguous.add(key)
            index[key] = i
    # A list that another program wrote has backslashes as they are.
    found = [next((key for key in (to_text(from_text(name)), to_text(name)) if key in index), None) for name in names]
    missing = [to_text(name) for name, key in zip(names, found, strict=True) if key is None]
    if missing:
        raise ValueError(
            f"{origin}: {len(missing):,} of {len(names):,} names are not in the data, such as {missing[0]}"
        )
    if several := [key for key in found if key in ambiguous]:
        raise ValueError(f"{origin}: {several[0]} is the name of several images: give names with their folders")
    samples = np.array(sorted({index[key] for key in found if key is not None}), np.int64)
    if len(samples) < len(names):
        raise ValueError(f"{origin}: {len(names) - len(samples)} of its {len(names)} lines are repetitions")
    return samples


def read_names(path: Path) -> list[str]:
    """Return the lines of a list of names that are not empty. Raises ValueError if there are none."""
    names = [line for line in read_lines(path) if line]
    if not names:
        raise ValueError(f"{path} has no names in it")
    return names
