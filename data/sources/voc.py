"""PASCAL VOC's classification task: images that may show several classes, in the layout of the development kit.

VOC2007/ImageSets/Main/test.txt            identifiers of a split, one per line
VOC2007/ImageSets/Main/cat_test.txt        the same with 1: a cat, -1: no cat, 0: only cats that are difficult to see
VOC2007/JPEGImages/000001.jpg
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.names import read_lines
from data.sources.folder import ImageFolder


def read_split(root: Path, split: str) -> tuple[ImageFolder, list[str], NDArray[np.int64]]:
    """Read the lists of a split.

    Args:
        root: The folder VOC2007.
        split: Name of the split, such as test.

    Returns:
        The images, the sorted classes, and int64 [n, classes] of 1, -1 and 0 (difficult).

    Raises:
        ValueError: Files are missing or do not agree.
    """
    lists = root / "ImageSets" / "Main"
    ids = _lines(lists / f"{split}.txt")
    names = [f"{line.split()[0]}.jpg" for line in ids]
    classes = sorted(path.name.removesuffix(f"_{split}.txt") for path in lists.glob(f"*_{split}.txt"))
    if not classes:
        raise ValueError(f"{lists} has no lists of classes such as aeroplane_{split}.txt")
    columns = []
    for name in classes:
        path = lists / f"{name}_{split}.txt"
        rows = [line.split() for line in _lines(path)]
        if [row[0] for row in rows] != ids or any(len(row) != 2 or row[1] not in ("1", "-1", "0") for row in rows):
            raise ValueError(f"{path} needs the identifiers of {split}.txt in their order, each with 1, -1 or 0")
        columns.append([int(row[1]) for row in rows])
    encoded = [os.fsencode(name) for name in names]
    offsets = np.concatenate([[0], np.cumsum([len(name) for name in encoded])])
    joined = np.frombuffer(bytearray(b"".join(encoded)), np.uint8)
    unlabelled = np.zeros(len(names), np.int64)
    images = ImageFolder(root / "JPEGImages", [root.resolve().name], unlabelled, joined, offsets)
    return images, classes, np.array(columns, np.int64).T.copy()


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in read_lines(path) if line]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: need VOC's development kit, VOCdevkit/VOC2007") from error
