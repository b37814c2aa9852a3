"""Hugging Face `datasets` on disk: Arrow files (`save_to_disk`) and Parquet files with a column of encoded images.

The image column is the first with the feature Image, else one called image, img or jpg: a struct with the field
`bytes`, or binary. The label column is the first with the feature ClassLabel, else one called label.
Format of the description in the schema: https://huggingface.co/docs/datasets/about_arrow
"""

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.sources.base import SharedArray, Source, UnreadableImage, make_classes
from data.sources.files import retried
from data.sources.index import Part

# pyarrow is imported where it is used: most runs have no such files, and need not wait for it.

CACHE_BYTES = 256 << 20  # of a process, for row groups


class Columns(NamedTuple):
    """Names of the columns, and what the labels are called if the file says so."""

    image: str
    label: str | None
    classes: list[str] | None


def find_columns(schema: Any, file: Path) -> Columns:
    """The columns in a pyarrow schema. Raises ValueError if there is no image column."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (described.get("info") or {}).get("features") or {}
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [name for name in schema.names if kinds.get(name) == "Image"]
    images += [name for name in ("image", "img", "jpg") if name in schema.names]
    if not images:
        raise ValueError(f"{file} has no column of images, only {', '.join(schema.names)}")
    labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    labels += [name for name in ("label",) if name in schema.names]
    label = labels[0] if labels else None
    return Columns(images[0], label, features[label].get("names") if label in features else None)


def image_bytes(column: Any, file: Path) -> Any:
    """The (large) binary array of an image column. Raises ValueError if it holds another thing."""
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        if column.type.get_field_index("bytes") < 0:
            raise ValueError(f"{file}: the column of images has no field 'bytes'")
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{file}: the column of images holds {column.type}, it must hold encoded pictures (binary)")
    return column


def labels_of(column: Any) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct labels of an array as text, and for each row which; -1 where there is none (null, or -1)."""
    encoded = column.dictionary_encode()
    values = [str(value) for value in encoded.dictionary.to_pylist()]
    labelled = np.array([value != "-1" for value in values] + [False])
    place = np.where(labelled, labelled.cumsum() - 1, -1)
    return [value for value in values if value != "-1"], place[
        encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    ]


def scan_arrow(file: Path) -> Part:
    """The pictures in an Arrow file, which holds them as they are, so that they can be read by offset as from a tar.

    Raises ValueError if it is damaged or compressed, or has no pictures.
    """
    import pyarrow as pa

    keys: list[str] = []
    none = np.empty(0, np.int64)
    labels, starts, sizes = [none], [none], [none]
    try:
        with pa.memory_map(str(file)) as mapped:
            base = mapped.read_buffer().address
            mapped.seek(0)
            schema, batches = _opened(mapped)
            columns = find_columns(schema, file)
            for batch in batches:
                images = image_bytes(batch.column(columns.image), file)
                if images.null_count:
                    raise ValueError(f"{file}: {images.null_count} rows have no bytes: save it with the pictures in")
                _, offsets, data = images.buffers()
                if not data:
                    if len(images):
                        raise ValueError(f"{file}: {len(images)} pictures of no bytes at all")
                    continue
                width = np.int64 if pa.types.is_large_binary(images.type) else np.int32
                bounds = np.frombuffer(offsets, width)[images.offset : images.offset + len(images) + 1]
                if not 0 <= data.address - base < mapped.size():
                    raise ValueError(f"{file} is compressed: save it without compression")
                starts.append(bounds[:-1].astype(np.int64) + (data.address - base))
                sizes.append(np.diff(bounds).astype(np.int64))
                batch_keys: list[str] = []
                batch_labels = np.full(len(images), -1)
                if columns.label:
                    batch_keys, batch_labels = labels_of(batch.column(columns.label))
                labels.append(np.where(batch_labels < 0, -1, batch_labels + len(keys)))
                keys += batch_keys
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not an Arrow file, or damaged: {error}") from error
    names = [str(row) for row in range(sum(map(len, starts)))]
    return Part(
        names, keys, np.concatenate(labels), np.concatenate(starts), np.concatenate(sizes), classes=columns.classes
    )


def _opened(mapped: Any) -> tuple[Any, Any]:
    """Schema and record batches: of the streaming format, which `datasets` writes, or of the file format."""
    import pyarrow as pa

    magic = mapped.read(6)
    mapped.seek(0)
    if magic != b"ARROW1":
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, stream
    file = pa.ipc.open_file(mapped)
    return file.schema, map(file.get_batch, range(file.num_record_batches))


class ParquetFiles(Source):
    """Parquet compresses rows in groups, so a picture costs the reading of its group (often 100 to 1000 pictures).

    The last groups are kept, up to CACHE_BYTES in a process: enough for an order in blocks as long as the groups. For
    a global order the data set is better written into shards first.
    """

    def __init__(self, root: Path, files: list[Path]) -> None:
        """Reads the files' footers and labels. Raises ValueError if they are damaged or have no images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        codes: dict[str, int] = {}
        labels: list[NDArray[np.int64]] = []
        rows: list[int] = []
        self._group_of: list[tuple[int, int]] = []  # of each row group: number of the file, number in the file
        names = None
        for number, file in enumerate(files):
            try:
                with pq.ParquetFile(file) as parquet:
                    self._column, label, file_names = find_columns(parquet.schema_arrow, file)
                    kind = parquet.schema_arrow.field(self._column).type
                    image_bytes(pa.array([], kind), file)
                    groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
                    keys: list[str] = []
                    found = np.full(sum(groups), -1)
                    if label and groups:
                        keys, found = labels_of(parquet.read([label]).column(0).combine_chunks())
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{file} is not a Parquet file, or damaged: {error}") from error
            names = names or file_names
            code = np.array([codes.setdefault(key, len(codes)) for key in keys] + [-1])
            labels.append(code[found])
            rows += groups
            self._group_of += [(number, g) for g in range(len(groups))]
        self._files = [str(file) for file in files]
        self._starts = np.cumsum([0, *rows])  # first row of each group, of all files
        self.classes, numbers = make_classes(root, codes, np.concatenate(labels), names)
        self._labels = SharedArray(numbers)

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self._labels.array

    def __len__(self) -> int:
        return len(self._labels.array)

    def name(self, i: int) -> str:
        """The file, the row group in it, and the row in that."""
        group = self._group(i)
        file, number = self._group_of[group]
        return f"{Path(self._files[file]).name}/{number}/{i - self._starts[group]}"

    def read(self, i: int) -> bytes:
        """The encoded bytes of sample i. Raises UnreadableImage."""
        import pyarrow as pa

        group = self._group(i)
        file, number = self._group_of[group]
        try:
            rows = _row_group(self._files[file], number, self._column)
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
    """The encoded pictures of a row group, a pyarrow binary array. Raises OSError, ValueError or ArrowException."""
    import pyarrow.parquet as pq

    with _cache_lock:
        if (file, number) in _cache:
            _cache.move_to_end((file, number))
            return _cache[file, number]

    def read() -> Any:
        with pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(number, [column]).column(0).combine_chunks()

    images = image_bytes(retried(read), Path(file))
    with _cache_lock:
        _cache[file, number] = images
        while len(_cache) > 1 and sum(kept.nbytes for kept in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
    return images
