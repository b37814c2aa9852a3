"""Classes of a data set from the labels that it stores."""

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.names import from_text, read_lines, to_text


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
        return [to_text(root.resolve().name)], np.zeros(len(labels), np.int64)
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
            return number_repeated(names), np.array([int(key) for key in codes])[labels]
    index = {key: k for k, key in enumerate(keys)}
    return [to_text(key) for key in keys], np.array([index[key] for key in codes])[labels]


def label_text(value: object) -> str | None:
    """Return a stored label as text, or None for no label: null, NaN, -1, empty text, or what is no text or number."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if value != value else value
    return str(value) if isinstance(value, int | float | str) and str(value) not in ("", "-1") else None


def read_classes(path: Path) -> list[str] | None:
    """Return the names in a classes.txt, one for each label, or None if the file does not exist.

    Raises ValueError if a line between two names is empty.
    """
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        return None
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is empty: line k + 1 must have the name of label k")
    return number_repeated([to_text(from_text(line)) for line in lines])


def require_same_classes(names: list[str] | None, more: list[str] | None, file: Path) -> list[str] | None:
    """Return the names of the classes that files agree on. Raises ValueError if `file` has `more`, which differ."""
    if names and more and names != more:
        k = next(k for k in range(len(names) + 1) if names[k : k + 1] != more[k : k + 1])
        first, here = (repr(some[k]) if k < len(some) else "no class" for some in (names, more))
        raise ValueError(f"{file}: label {k} is {here}, but {first} in the files before it: open them separately")
    return names or more


def number_repeated(names: list[str]) -> list[str]:
    """Return different names for all classes: ImageNet has two cranes, `crane (134)` and `crane (517)`."""
    counts = Counter(names)
    return [f"{name} ({k})" if counts[name] > 1 else name for k, name in enumerate(names)]
