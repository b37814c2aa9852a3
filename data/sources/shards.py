"""Shards: large files, such as tar files, in which encoded images lie one after another and are read by offset."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from data.sources.base import SharedArray, UnreadableImage
from data.sources.classes import make_classes, read_classes, require_same_classes
from data.sources.files import read_range, short_names
from data.sources.index import SCAN_THREADS, Listing, join_names, log_listing, split_names
from data.sources.selection import LeftOut


class ShardContents(NamedTuple):
    """The n images in a shard."""

    names: list[str]
    keys: list[str]  # the distinct labels, as stored
    labels: NDArray[np.int64]  # [n], indices into keys; -1: no label
    starts: NDArray[np.int64]  # [n] in bytes
    sizes: NDArray[np.int64]  # [n] in bytes
    classes: list[str] | None = None  # names of the labels 0, 1, …, if the file has them
    left_out: LeftOut = LeftOut()


class Shards(Listing):
    """The images in a list of shards."""

    ARRAYS = Listing.ARRAYS | {"files", "file_sizes", "file_of", "starts", "sizes"}
    PER_IMAGE = (*Listing.PER_IMAGE, "file_of", "starts", "sizes")
    SEPARATOR = "\0"  # stored labels may contain any other character

    def __init__(
        self,
        root: Path,
        classes: list[str],
        labels: NDArray[np.int64],
        names: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        *,
        files: NDArray[np.uint8],  # paths of the shards, joined by NUL bytes
        file_sizes: NDArray[np.int64],  # in bytes, when the shards were listed
        file_of: NDArray[np.int32],  # [n] index of each image's shard
        starts: NDArray[np.int64],  # [n] offset of each image in its shard, in bytes
        sizes: NDArray[np.int64],  # [n] in bytes
    ) -> None:
        super().__init__(root, classes, labels, names, offsets)
        self.files = split_names(files, self.SEPARATOR)
        self._file_names = short_names([Path(file) for file in self.files])
        self._file_sizes = file_sizes
        self._file_of = SharedArray(file_of)
        self._starts = SharedArray(starts)
        self._sizes = SharedArray(sizes)

    @classmethod
    def scan(cls, root: Path, files: list[Path], scan_file: Callable[[Path], ShardContents]) -> Self:
        """List the images in shards.

        Classes have the names of the stored labels. If these are numbers, the names come from the shards that have
        names, or from the lines of a classes.txt beside the first shard.

        Args:
            root: The path that stands for the shards.
            files: The shards.
            scan_file: Lists the images in a shard.

        Raises:
            ValueError: There are no images, only some have a label, or the shards name their classes differently.
        """
        names, left_out = None, LeftOut()
        codes: dict[str, int] = {}
        blocks: list[bytes] = []
        columns: list[tuple[NDArray[np.int64], ...]] = []
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            for file, contents in zip(files, pool.map(scan_file, files), strict=True):
                names = require_same_classes(names, contents.classes, file)
                left_out.update(contents.left_out)
                code = np.array([codes.setdefault(key, len(codes)) for key in contents.keys] + [-1])
                encoded = [name.encode("utf-8", "surrogateescape") for name in contents.names]
                blocks.append(b"".join(encoded))
                name_sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
                columns.append((name_sizes, code[contents.labels], contents.starts, contents.sizes))
        name_sizes, labels, starts, sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
        names = names or read_classes(files[0].with_name("classes.txt"))
        classes, labels = make_classes(root, codes, labels, names)
        source = cls(
            root,
            classes,
            labels,
            np.frombuffer(bytearray().join(blocks), np.uint8),
            np.concatenate([[0], np.cumsum(name_sizes)]),
            files=join_names([str(file.absolute()) for file in files], cls.SEPARATOR),
            file_sizes=np.array([file.stat().st_size for file in files], np.int64),
            file_of=np.repeat(np.arange(len(files), dtype=np.int32), [len(column[0]) for column in columns]),
            starts=starts,
            sizes=sizes,
        )
        log_listing(root, source, left_out)
        return source

    def name(self, i: int) -> str:
        """Return the name of image i's shard and the image's name in it."""
        return f"{self._file_names[self._file_of.array[i]]}/{super().name(i)}"

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image i. Raises UnreadableImage."""
        file = self.files[self._file_of.array[i]]
        try:
            return read_range(file, int(self._starts.array[i]), int(self._sizes.array[i]))
        except EOFError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error
        except OSError as error:
            raise UnreadableImage(f"{self.name(i)}: {error.strerror}") from error

    def consists_of(self, files: list[Path]) -> bool:
        """Return whether these are the shards, in this order."""
        return self.files == [str(file.absolute()) for file in files]

    def identity(self) -> dict[str, NDArray[Any]]:
        """Return labels, names and sizes; see `LabelledSource.identity`."""
        return {**super().identity(), "sizes": self._sizes.array}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the index, except for the root."""
        return {
            **super().arrays(),
            "files": join_names(self.files, self.SEPARATOR),
            "file_sizes": self._file_sizes,
            "file_of": self._file_of.array,
            "starts": self._starts.array,
            "sizes": self._sizes.array,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], root: Path) -> Self:
        """Make a list from the arrays of `read_index`. Raises ValueError if a shard has another size than before."""
        source = super().from_arrays(arrays, root)
        # In a changed shard, the offsets would point to other bytes, which might even decode.
        for file, size in zip(source.files, source._file_sizes.tolist(), strict=True):
            if (now := os.path.getsize(file)) != size:
                raise ValueError(f"{file} has {now} bytes, and had {size} when its index was made: make a new index")
        return source
