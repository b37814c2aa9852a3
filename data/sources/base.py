"""The interface of a data set: a list of labelled images, each stored encoded or as pixels.

A source is cheap to send to worker processes, because its large arrays are in shared memory.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data.decode import decode


class UnreadableImage(Exception):
    """An image cannot be read or decoded; the message is one line with its name and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class Source(Protocol):
    """A list of labelled images. Its names of images and classes are text, as `data.names` defines it."""

    classes: list[str]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each image, an index into `classes`: int64 [n]."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Return the name of image i."""
        ...

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Return image i as it is stored: encoded, or as pixels, uint8 [H, W, 3] RGB. Raises UnreadableImage."""
        ...

    def image(self, i: int) -> NDArray[np.uint8]:
        """Return the pixels of image i, uint8 [H, W, 3] RGB. Raises UnreadableImage."""
        stored = self.read(i)
        if isinstance(stored, np.ndarray):
            return stored
        try:
            return decode(stored)
        except ValueError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error


class SharedArray:
    """An array that worker processes map instead of copying: the first pickling moves it to shared memory.

    An index of 14 M files is half a gigabyte, and a node starts a hundred workers.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._tensor = torch.from_numpy(array)

    @property
    def array(self) -> NDArray[Any]:
        """The array. One that was taken before the move to shared memory stays as it is."""
        return self._tensor.numpy()

    def __getstate__(self) -> torch.Tensor:
        if not self._tensor.is_shared():
            # Moving the tensor itself would free memory that arrays may still use.
            self._tensor = torch.empty_like(self._tensor).share_memory_().copy_(self._tensor)
        return self._tensor

    def __setstate__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor


class LabelledSource(Source):
    """A source that stores its classes and labels."""

    def __init__(self, classes: list[str], labels: NDArray[np.int64]) -> None:
        self.classes = classes
        self._labels = SharedArray(labels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each image, an index into `classes`: int64 [n]."""
        return self._labels.array

    def __len__(self) -> int:
        return len(self._labels.array)

    def identity(self) -> dict[str, NDArray[Any]]:
        """Return arrays that differ between data sets, by what they hold, without reading images; no absolute paths."""
        return {"labels": self.labels}
