"""The binary version of CIFAR-10 and CIFAR-100: a record is 1 or 2 label bytes, then 3 planes of 32 x 32 pixels.

Format: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.sources.base import LabelledSource, SharedArray
from data.sources.classes import read_classes

FILES = re.compile(r"(data_batch_\d+|test_batch|train|test)\.bin")
TRAINING = re.compile(r"(data_batch_\d+|train)\.bin")
PIXELS = 3 * 32 * 32


class CifarBinary(LabelledSource):
    """The images of CIFAR's binary files, in memory; CIFAR-100 with its fine labels."""

    def __init__(self, files: list[Path]) -> None:
        """Read the files, and the class names beside them. Raises ValueError if they have another format."""
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
        names = files[0].with_name("batches.meta.txt" if "batch" in files[0].name else "fine_label_names.txt")
        max_label = max(int(part.max()) for part in labels)
        classes = read_classes(names) or [str(label) for label in range(max_label + 1)]
        if max_label >= len(classes):
            raise ValueError(f"{names} names {len(classes)} classes, but there is a label {max_label}")
        super().__init__(classes, np.concatenate(labels))
        self._images = SharedArray(np.concatenate(images))
        self._files = [file.name for file in files]
        self._starts = np.cumsum([0, *counts])

    def name(self, i: int) -> str:
        """Return the file of image i and its position there."""
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        return f"{self._files[file]}[{i - self._starts[file]}]"

    def identity(self) -> dict[str, NDArray[Any]]:
        """Return labels and pixels; see `LabelledSource.identity`."""
        return {**super().identity(), "pixels": self._images.array}

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return image i, uint8 [32, 32, 3]."""
        return np.ascontiguousarray(self._images.array[i].reshape(3, 32, 32).transpose(1, 2, 0))
