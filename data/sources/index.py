"""Lists of named images, and the file (the index) that stores such a list.

An index takes about 45 bytes per image of a folder and 70 per image of shards, with names of 30 bytes.
"""

import logging
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from data.names import from_text, to_text
from data.sources.base import LabelledSource, SharedArray, Source
from data.sources.selection import LeftOut

log = logging.getLogger(__name__)

SCAN_THREADS = 16  # network storage answers many requests at once, each after a millisecond


class Listing(LabelledSource):
    """Named images under a root. The names are stored as one block of bytes, as they are in the file system."""

    # The arrays of an index, apart from the root; those in PER_IMAGE have one element per image.
    ARRAYS: ClassVar[frozenset[str]] = frozenset({"classes", "labels", "names", "offsets"})
    PER_IMAGE: ClassVar[tuple[str, ...]] = ("labels",)
    SEPARATOR: ClassVar[str] = "/"  # between the classes in an index: folder names have no slash

    def __init__(
        self,
        root: Path,  # the path that was listed
        classes: list[str],
        labels: NDArray[np.int64],  # [n]
        names: NDArray[np.uint8],  # all names, one after another
        offsets: NDArray[np.int64],  # [n + 1], such that name i is names[offsets[i] : offsets[i + 1]]
    ) -> None:
        super().__init__(classes, labels)
        self.root = root
        self._names = SharedArray(names)
        self._offsets = SharedArray(offsets)

    def name(self, i: int) -> str:
        """Return the path of image i relative to the root, as text."""
        return to_text(self.stored_name(i))

    def stored_name(self, i: int) -> bytes:
        """Return the path of image i relative to the root."""
        start, stop = self._offsets.array[i : i + 2].tolist()
        return self._names.array[start:stop].tobytes()

    def identity(self) -> dict[str, NDArray[Any]]:
        """Return labels and names; see `LabelledSource.identity`."""
        return {**super().identity(), "names": self._names.array, "lengths of names": np.diff(self._offsets.array)}

    def changed_since(self, seconds: float) -> bool:
        """Return whether images may have been added or removed since a time in seconds of the epoch."""
        return False

    def without(self, samples: list[int]) -> Self:
        """Return the list without some images; the classes stay the same."""
        keep = np.ones(len(self), bool)
        keep[samples] = False
        arrays = self.arrays()
        sizes = np.diff(self._offsets.array)
        arrays["names"] = self._names.array[np.repeat(keep, sizes)]
        arrays["offsets"] = np.concatenate([[0], np.cumsum(sizes[keep])])
        arrays |= {name: arrays[name][keep] for name in self.PER_IMAGE}
        return self.from_arrays(arrays, self.root)

    @classmethod
    def load(cls, index: Path, root: Path) -> Self | None:
        """Return the list that `save` wrote, or None if there is no index of this root, or the root has changed since.

        Raises OSError if the index exists and cannot be read.
        """
        try:
            found, arrays = read_index(index)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("%s: scanning again and replacing it", error)
            return None
        if found != root.resolve() or arrays.keys() != cls.ARRAYS:
            return None
        try:
            listing = cls.from_arrays(arrays, root)
        except (ValueError, FileNotFoundError) as error:  # a shard was replaced or removed
            log.info("%s: listing %s again", error, root)
            return None
        if root.is_dir() and listing.changed_since(index.stat().st_mtime):
            log.info("%s has changed since %s was written: listing it again", root, index)
            return None
        return listing

    def save(self, index: Path) -> None:
        """Write the list for `load`, atomically, so that several ranks may do this at once."""
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = index.with_name(f".{index.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                root = np.frombuffer(os.fsencode(self.root.resolve()), np.uint8)
                np.savez(file, root=root, **self.arrays())  # type: ignore[arg-type]
            os.replace(temporary, index)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the index, except for the root."""
        return {
            "classes": join_names(self.classes, self.SEPARATOR),
            "labels": self.labels,
            "names": self._names.array,
            "offsets": self._offsets.array,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], root: Path) -> Self:
        """Make a list from the arrays of `read_index`. Raises ValueError if the files have changed since."""
        # An index of an earlier version has the bytes of the classes.
        classes = [to_text(from_text(name)) for name in split_names(arrays["classes"], cls.SEPARATOR)]
        return cls(root, classes, **{name: arrays[name] for name in cls.ARRAYS - {"classes"}})


def read_index(index: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Return the root and the arrays of an index. Raises OSError, or ValueError if the file is not an index."""
    try:
        with np.load(index, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        root = Path(os.fsdecode(arrays.pop("root").tobytes()))
        missing = Listing.ARRAYS - arrays.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return root, arrays
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{index} is not an index of a folder or of shards") from error


def join_names(names: list[str], separator: str) -> NDArray[np.uint8]:
    """Return the names as one array of bytes."""
    return np.frombuffer(separator.encode().join(os.fsencode(name) for name in names), np.uint8)


def split_names(joined: NDArray[np.uint8], separator: str) -> list[str]:
    """Undo `join_names`."""
    return [os.fsdecode(name) for name in joined.tobytes().split(separator.encode())]


def log_listing(root: Path, source: Source, left_out: LeftOut | None = None) -> None:
    """Log how many images a listing has, and what it left out."""
    counts = f"{len(source):,} images in {len(source.classes):,} classes"
    log.info("%s: %s%s", to_text(os.fsencode(root)), counts, f"; left out: {left_out}" if left_out is not None else "")
