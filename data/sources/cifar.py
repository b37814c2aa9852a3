"""CIFAR-10 and CIFAR-100 in their binary version: a record is 1 or 2 bytes of label, then 3 planes of 32 x 32 pixels.

Format: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources.base import SharedArray, Source, read_classes

FILES = re.compile(r"(data_batch_\d+|test_batch|train|test)\.bin")
TRAINING = re.compile(r"(data_batch_\d+|train)\.bin")
PIXELS = 3 * 32 * 32


class CifarBinary(Source):
    """Everything is read into memory. CIFAR-100 has its fine labels."""

    def __init__(self, files: list[Path]) -> None:
        """Reads the files, and the names of classes beside them. Raises ValueError if they are another thing."""
        images, labels, counts = [], [], []
        for file in files:
            if not FILES.fullmatch(file.name):
                raise ValueError(
                    f"{file} is not named like CIFAR: data_batch_1.bin, test_batch.bin, train.bin, test.bin"
                )
            label_bytes = 1 if "batch" in file.name else 2
            data = np.fromfile(file, np.uint8)
            if len(data) == 0 or len(data) % (label_bytes + PIXELS):
                raise ValueError(f"{file} is damaged: {len(data)} bytes are not records of {label_bytes + PIXELS}")
            records = data.reshape(-1, label_bytes + PIXELS)
            labels.append(records[:, label_bytes - 1].astype(np.int64))
            images.append(records[:, label_bytes:])
            counts.append(len(records))
        self._images, self._labels = SharedArray(np.concatenate(images)), SharedArray(np.concatenate(labels))
        self._files = [file.name for file in files]
        self._starts = np.cumsum([0, *counts])
        names = files[0].with_name("batches.meta.txt" if "batch" in files[0].name else "fine_label_names.txt")
        most = int(self.labels.max())
        self.classes = [name for name in read_classes(names) or map(str, range(most + 1)) if name]
        if most >= len(self.classes):
            raise ValueError(f"{names} names {len(self.classes)} classes, but there is a label {most}")

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self._labels.array

    def __len__(self) -> int:
        return len(self._labels.array)

    def name(self, i: int) -> str:
        """The file and the number in it."""
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        return f"{self._files[file]}[{i - self._starts[file]}]"

    def read(self, i: int) -> NDArray[np.uint8]:
        """Sample i: uint8 [32, 32, 3]."""
        return np.ascontiguousarray(self._images.array[i].reshape(3, 32, 32).transpose(1, 2, 0))
