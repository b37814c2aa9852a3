"""Sources that are a list of names and places, and the file (the index) that keeps such a list.

About 45 bytes a picture for a folder and 70 for shards, with names of 30 bytes.
"""

import logging
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data.sources.base import SharedArray, Source, UnreadableImage, make_classes, read_classes
from data.sources.files import read_range

logger = logging.getLogger(__name__)

SCAN_THREADS = 16  # network storage answers many at once, each after a millisecond


class Listing(Source):
    """Samples with a name each. Names are kept as one block of bytes."""

    def __init__(
        self,
        root: Path,
        classes: list[str],
        labels: NDArray[np.int64],
        names: NDArray[np.uint8],
        offsets: NDArray[np.int64],
    ) -> None:
        """root: what was listed. The name of sample i is the bytes `offsets[i]` to `offsets[i + 1]` of `names`."""
        self.root = root
        self.classes = classes
        self._labels = SharedArray(labels)
        self._names = SharedArray(names)
        self._offsets = SharedArray(offsets)

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self._labels.array

    def __len__(self) -> int:
        return len(self._offsets.array) - 1

    def name(self, i: int) -> str:
        """Path of sample i in what was listed."""
        start, stop = self._offsets.array[i : i + 2].tolist()
        return os.fsdecode(self._names.array[start:stop].tobytes())

    def without(self, samples: list[int]) -> Self:
        """The same list, less some samples; classes stay as they are."""
        keep = np.ones(len(self), bool)
        keep[samples] = False
        arrays = self._arrays()
        sizes = np.diff(self._offsets.array)
        arrays["names"] = self._names.array[np.repeat(keep, sizes)]
        arrays["offsets"] = np.concatenate([[0], np.cumsum(sizes[keep])])
        arrays |= {name: arrays[name][keep] for name in ("labels", *self._PER_SAMPLE)}
        return self.from_arrays(arrays, self.root)

    @classmethod
    def load(cls, index: Path, root: Path) -> Self | None:
        """The listing that `save` wrote to `index`, or None if there is none for this root.

        Raises OSError if it is there and cannot be read, ValueError if files have changed since.
        """
        try:
            found, arrays = read_index(index)
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("%s: scanning again and replacing it", error)
            return None
        if found != root.resolve() or ("files" in arrays) != issubclass(cls, Packed):
            return None
        return cls.from_arrays(arrays, root)

    def save(self, index: Path) -> None:
        """Writes the listing for `load`, atomically: several ranks may do this at once."""
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = index.with_name(f".{index.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                root = np.frombuffer(os.fsencode(self.root.resolve()), np.uint8)
                np.savez(file, root=root, **self._arrays())  # type: ignore[arg-type]
            os.replace(temporary, index)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    _PER_SAMPLE: tuple[str, ...] = ()  # arrays of a subclass with one number a sample

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """What `save` writes, apart from the root."""
        return {
            "classes": _joined(self.classes),
            "labels": self.labels,
            "names": self._names.array,
            "offsets": self._offsets.array,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], root: Path) -> Self:
        """From what `read_index` gave. Raises ValueError if it no longer fits the files."""
        classes = _split(arrays["classes"])
        return cls(root, classes, arrays["labels"], arrays["names"], arrays["offsets"])


class Part(NamedTuple):
    """The n pictures in one of the files of a `Packed`."""

    names: list[str]
    keys: list[str]  # the labels that occur, as stored
    labels: NDArray[np.int64]  # [n], indices into keys; -1: no label
    starts: NDArray[np.int64]  # [n] in bytes
    sizes: NDArray[np.int64]  # [n] in bytes
    classes: list[str] | None = None  # what labels 0, 1, … are called, if the file says so


class Packed(Listing):
    """Encoded pictures that lie one after another in larger files, such as tar shards: read by offset."""

    _PER_SAMPLE = ("file_of", "starts", "sizes")

    def __init__(
        self,
        root: Path,
        classes: list[str],
        labels: NDArray[np.int64],
        names: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        *,
        files: list[str],
        file_sizes: NDArray[np.int64],
        file_of: NDArray[np.int32],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None:
        """Sample i is `sizes[i]` bytes from `starts[i]` of `files[file_of[i]]`, a path.

        `file_sizes`: in bytes when they were listed.
        """
        super().__init__(root, classes, labels, names, offsets)
        self.files = files
        self._file_sizes = file_sizes
        self._file_of = SharedArray(file_of)
        self._starts = SharedArray(starts)
        self._sizes = SharedArray(sizes)

    @classmethod
    def scan(cls, root: Path, files: list[Path], scan_file: Callable[[Path], Part]) -> Self:
        """Lists the pictures of `files`, which are what `root` stands for, by what `scan_file` says of each.

        Classes are called as the labels or, if those are numbers, as the first file says or by the lines of a
        classes.txt beside it. Raises ValueError if there are no pictures, or only some have a label.
        """
        classes = read_classes(files[0].with_name("classes.txt"))
        codes: dict[str, int] = {}
        blocks: list[bytes] = []
        columns: list[tuple[NDArray[np.int64], ...]] = []
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            for part in pool.map(scan_file, files):
                classes = part.classes or classes
                code = np.array([codes.setdefault(key, len(codes)) for key in part.keys] + [-1])
                encoded = [os.fsencode(name) for name in part.names]
                blocks.append(b"".join(encoded))
                name_sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
                columns.append((name_sizes, code[part.labels], part.starts, part.sizes))
        name_sizes, labels, starts, sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
        file_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(column[0]) for column in columns])
        classes, labels = make_classes(root, codes, labels, classes)
        return cls(
            root,
            classes,
            labels,
            np.frombuffer(bytearray().join(blocks), np.uint8),
            np.concatenate([[0], np.cumsum(name_sizes)]),
            files=[str(file.resolve()) for file in files],
            file_sizes=np.array([file.stat().st_size for file in files], np.int64),
            file_of=file_of,
            starts=starts,
            sizes=sizes,
        )

    def name(self, i: int) -> str:
        """The file of sample i and its name there."""
        return f"{os.path.basename(self.files[self._file_of.array[i]])}/{super().name(i)}"

    def read(self, i: int) -> bytes:
        """The encoded bytes of sample i. Raises UnreadableImage."""
        file = self.files[self._file_of.array[i]]
        try:
            return read_range(file, int(self._starts.array[i]), int(self._sizes.array[i]))
        except EOFError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error
        except OSError as error:
            raise UnreadableImage(f"{self.name(i)}: {error.strerror}") from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            **super()._arrays(),
            "classes": _joined(self.classes, "\0"),  # stored labels may be any text, a folder's name has no slash
            "files": _joined(self.files, "\0"),
            "file_sizes": self._file_sizes,
            "file_of": self._file_of.array,
            "starts": self._starts.array,
            "sizes": self._sizes.array,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], root: Path) -> Self:
        files = _split(arrays["files"], "\0")
        # At other offsets there would be other bytes, which might even decode.
        for file, size in zip(files, arrays["file_sizes"].tolist(), strict=True):
            if (now := os.path.getsize(file)) != size:
                raise ValueError(f"{file} has {now} bytes, and had {size} when its index was made: make a new index")
        return cls(
            root,
            _split(arrays["classes"], "\0"),
            arrays["labels"],
            arrays["names"],
            arrays["offsets"],
            files=files,
            file_sizes=arrays["file_sizes"],
            file_of=arrays["file_of"],
            starts=arrays["starts"],
            sizes=arrays["sizes"],
        )


def read_index(index: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    """The root that an index was made of, and its arrays. Raises OSError, or ValueError if it is another thing."""
    try:
        with np.load(index, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        root = Path(os.fsdecode(arrays.pop("root").tobytes()))
        missing = {"classes", "labels", "names", "offsets"} - arrays.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return root, arrays
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"{index} is not an index of a folder or of shards") from error


def _joined(names: list[str], separator: str = "/") -> NDArray[np.uint8]:
    return np.frombuffer(separator.encode().join(os.fsencode(name) for name in names), np.uint8)


def _split(joined: NDArray[np.uint8], separator: str = "/") -> list[str]:
    return [os.fsdecode(name) for name in joined.tobytes().split(separator.encode())]
