"""What a data set is to the rest: a list of labelled pictures, each encoded or as pixels.

A source is cheap to hand to worker processes: large arrays travel as shared memory.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data.decode import decode


class UnreadableImage(Exception):
    """A sample that cannot be read or decoded; the message has its name and the reason."""


class Source(Protocol):
    """A list of labelled pictures."""

    classes: list[str]

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call sample i in messages."""
        ...

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Sample i as it is stored: the encoded picture, or its pixels, uint8 [H, W, 3] RGB. Raises UnreadableImage."""
        ...

    def image(self, i: int) -> NDArray[np.uint8]:
        """Sample i: uint8 [H, W, 3] RGB. Raises UnreadableImage."""
        stored = self.read(i)
        if isinstance(stored, np.ndarray):
            return stored
        try:
            return decode(stored)
        except ValueError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error


class SharedArray:
    """An array that worker processes map rather than copy: the first pickling moves it to shared memory.

    An index of 14 M files is half a gigabyte, and a node starts a hundred workers.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._tensor = torch.from_numpy(array)

    @property
    def array(self) -> NDArray[Any]:
        # Not kept: moving to shared memory would leave an earlier view of the storage dangling.
        return self._tensor.numpy()

    def __getstate__(self) -> torch.Tensor:
        return self._tensor.share_memory_()

    def __setstate__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor


def make_classes(
    root: Path, codes: dict[str, int], labels: NDArray[np.int64], names: list[str] | None
) -> tuple[list[str], NDArray[np.int64]]:
    """Classes and labels of the samples of `root`; `labels[i]` is what `codes` says of the stored one, -1 without one.

    If all stored labels are numbers and there are `names`, label k is called `names[k]`. Otherwise a class is called as
    it is stored; they are sorted, numbers by value. Without any label all are one class, called as the root.
    Raises ValueError if there are no samples, only some have a label, or a number has no name.
    """
    if len(labels) == 0:
        raise ValueError(f"{root} has no pictures")
    if not codes:
        return [root.resolve().name], np.zeros(len(labels), np.int64)
    missing = int((labels < 0).sum())
    if missing:
        raise ValueError(f"{root}: {missing} of {len(labels)} pictures have no label: label all, or none")
    if any("\0" in key for key in codes):
        raise ValueError(f"{root} has labels with a NUL in them")
    keys = sorted(codes)
    if all(key.isascii() and key.isdecimal() for key in keys):
        keys.sort(key=int)
        if names is not None:
            if int(keys[-1]) >= len(names):
                raise ValueError(f"{root} has a label {keys[-1]}, but names of {len(names)} classes only")
            return names, np.array([int(key) for key in codes])[labels]
    place = {key: k for k, key in enumerate(keys)}
    return keys, np.array([place[key] for key in codes])[labels]


def read_classes(path: Path) -> list[str] | None:
    """The lines of a classes.txt, None if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
