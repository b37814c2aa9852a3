"""Grey images in the IDX format of MNIST and Fashion-MNIST.

Format: http://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.sources.base import LabelledSource, SharedArray
from data.sources.classes import read_classes

PATTERN = re.compile(r"(.*)-images-idx3-ubyte(\.gz)?")


class IdxImages(LabelledSource):
    """The images of x-images-idx3-ubyte[.gz] with the labels of x-labels-idx1-ubyte[.gz] beside it, in memory.

    The names of the classes are their numbers, or the lines of a file classes.txt beside it.
    """

    def __init__(self, path: Path) -> None:
        """Read both files. Raises ValueError if one is missing, damaged or has another format."""
        match = PATTERN.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"{path} is not named like IDX images: it must be *-images-idx3-ubyte or *-images-idx3-ubyte.gz. Other "
                "formats are folders, .tar, .arrow, .parquet and .bin: unpack archives such as .tar.gz and .zip"
            )
        candidates = [path.with_name(f"{match[1]}-labels-idx1-ubyte{end}") for end in (match[2] or "", "", ".gz")]
        labels_path = next((p for p in candidates if p.is_file()), None)
        if labels_path is None:
            raise ValueError(f"{path} needs its labels beside it, in {candidates[0].name}; there is no such file")
        images, labels = _read_idx(path, 3), _read_idx(labels_path, 1).astype(np.int64)
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(
                f"{path} has {len(images)} images and {labels_path.name} {len(labels)} labels: need as many, not 0"
            )
        names, max_label = path.with_name("classes.txt"), int(labels.max())
        classes = read_classes(names) or [str(label) for label in range(max_label + 1)]
        if max_label >= len(classes):
            raise ValueError(f"{names} has {len(classes)} lines, but {labels_path.name} has label {max_label}")
        super().__init__(classes, labels)
        self._file = path.name
        self._images = SharedArray(images)

    def name(self, i: int) -> str:
        """Return the file and the position of image i in it."""
        return f"{self._file}[{i}]"

    def identity(self) -> dict[str, NDArray[Any]]:
        """Return labels and pixels; see `LabelledSource.identity`."""
        return {**super().identity(), "pixels": self._images.array}

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return image i, uint8 [H, W, 3] with the grey value in all channels."""
        return cv2.cvtColor(self._images.array[i], cv2.COLOR_GRAY2RGB)


def _read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """Return the uint8 array of `dims` dimensions in an IDX file, gzipped or not.

    Raises:
        ValueError: The file is damaged or has another format.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:  # gzip's own BadGzipFile is an OSError
        raise ValueError(f"{path} cannot be read: {error}") from error
    magic = bytes([0, 0, 8, dims])  # 8: unsigned bytes
    header = len(magic) + 4 * dims
    if not data.startswith(magic) or len(data) < header:
        raise ValueError(
            f"{path} is not an IDX file: it must begin with {magic.hex()} and {dims} sizes, "
            f"it begins with {data[:header].hex()}"
        )
    shape = np.frombuffer(data, ">u4", dims, len(magic)).tolist()
    if len(data) - header != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: its header says {shape}, so {math.prod(shape)} bytes, but it has {len(data) - header}"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(shape)
