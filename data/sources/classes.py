"""Classes of a data set from the labels that it stores."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def make_classes(
    root: Path, codes: dict[str, int], labels: NDArray[np.int64], names: list[str] | None
) -> tuple[list[str], NDArray[np.int64]]:
    """Turn stored labels into sorted classes and indices into them.

    If all stored labels are numbers and `names` are given, label k becomes the class `names[k]`. Otherwise each
    stored label is a class; numbers are sorted by value. Without any label, all images form one class, with the name
    of the root.

    Args:
        root: The data set, for the name of the class and for messages.
        codes: The code of each stored label.
        labels: The code of each image, int64 [n]; -1 for an image without a label.
        names: Names of the classes, if the data set has them.

    Returns:
        The classes, and the label of each image as int64 [n].

    Raises:
        ValueError: There are no images, only some images have a label, or a number has no name.
    """
    if len(labels) == 0:
        raise ValueError(f"{root} has no images")
    if not codes:
        return [root.resolve().name], np.zeros(len(labels), np.int64)
    missing = int((labels < 0).sum())
    if missing:
        raise ValueError(f"{root}: {missing} of {len(labels)} images have no label: label all, or none")
    if any("\0" in key for key in codes):
        raise ValueError(f"{root} has labels with a NUL in them")
    keys = sorted(codes)
    if all(key.isascii() and key.isdecimal() for key in keys):
        keys.sort(key=int)
        if names is not None:
            if int(keys[-1]) >= len(names):
                raise ValueError(f"{root} has a label {keys[-1]}, but only {len(names)} class names")
            return names, np.array([int(key) for key in codes])[labels]
    index = {key: k for k, key in enumerate(keys)}
    return keys, np.array([index[key] for key in codes])[labels]


def read_classes(path: Path) -> list[str] | None:
    """Return the lines of a classes.txt, or None if the file does not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
