"""Parquet files with a column of encoded images; the columns are those of `data.sources.arrow`."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.sources.arrow import encode_labels, find_columns, image_bytes
from data.sources.base import LabelledSource, UnreadableImage
from data.sources.classes import make_classes, require_same_classes
from data.sources.files import retry, short_names
from data.sources.index import log_listing

CACHE_BYTES = 256 << 20  # per process, for row groups


class ParquetFiles(LabelledSource):
    """The images of Parquet files.

    Parquet compresses rows in groups, so reading an image means reading its group (often 100 to 1000 images). The last
    groups are cached, up to CACHE_BYTES per process. That suffices for an order in blocks as long as the groups. For a
    global order, `python -m trainer data shard` should rewrite the data set first.
    """

    def __init__(self, root: Path, files: list[Path]) -> None:
        """Read footers and labels of the files. Raises ValueError if they are damaged or have no images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        codes: dict[str, int] = {}
        labels: list[NDArray[np.int64]] = []
        rows: list[int] = []
        self._group_of: list[tuple[int, int]] = []  # index of the file and index in the file of each row group
        self._columns: list[str] = []  # of the images in each file
        names = None
        for number, file in enumerate(files):
            try:
                with pq.ParquetFile(file) as parquet:
                    column, label, file_names = find_columns(parquet.schema_arrow, file)
                    kind = parquet.schema_arrow.field(column).type
                    image_bytes(pa.array([], kind), file)
                    groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
                    keys: list[str] = []
                    found = np.full(sum(groups), -1)
                    if label and groups:
                        keys, found = encode_labels(parquet.read([label]).column(0).combine_chunks())
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file} is not a Parquet file, or damaged: {error}") from error
            self._columns.append(column)
            names = require_same_classes(names, file_names, file)
            code = np.array([codes.setdefault(key, len(codes)) for key in keys] + [-1])
            labels.append(code[found])
            rows += groups
            self._group_of += [(number, g) for g in range(len(groups))]
        super().__init__(*make_classes(root, codes, np.concatenate(labels), names))
        self._files, self._file_names = [str(file) for file in files], short_names(files)
        self._file_sizes = np.array([file.stat().st_size for file in files])
        self._starts = np.cumsum([0, *rows])  # first row of each group, counted over all files
        log_listing(root, self)

    def name(self, i: int) -> str:
        """Return the file, the row group in it, and the row in the group."""
        group = self._group(i)
        file, number = self._group_of[group]
        return f"{self._file_names[file]}/{number}/{i - self._starts[group]}"

    def identity(self) -> dict[str, NDArray[Any]]:
        """Return labels, row groups and sizes of the files; see `LabelledSource.identity`."""
        return {**super().identity(), "row groups": self._starts, "sizes": self._file_sizes}

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image i. Raises UnreadableImage."""
        import pyarrow as pa

        group = self._group(i)
        file, number = self._group_of[group]
        try:
            rows = _row_group(self._files[file], number, self._columns[file])
            stored: bytes | None = rows[int(i - self._starts[group])].as_py()
            if stored is None:
                raise ValueError("the row has no bytes")
            return stored
        except (ValueError, pa.ArrowException, OSError) as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error

    def _group(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1


_cache: OrderedDict[tuple[str, int], Any] = OrderedDict()  # of this process
_cache_lock = threading.Lock()


def _row_group(file: str, number: int, column: str) -> Any:
    """Return the encoded images of a row group, a pyarrow binary array.

    Raises:
        OSError: The file cannot be read.
        ValueError: The column has another type.
        ArrowException: The row group is damaged.
    """
    import pyarrow.parquet as pq

    with _cache_lock:
        if (file, number) in _cache:
            _cache.move_to_end((file, number))
            return _cache[file, number]

    def read() -> Any:
        with pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(number, [column]).column(0).combine_chunks()

    images = image_bytes(retry(read), Path(file))
    with _cache_lock:
        _cache[file, number] = images
        while len(_cache) > 1 and sum(cached.nbytes for cached in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
    return images
