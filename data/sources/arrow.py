"""Arrow files of Hugging Face `datasets` (`save_to_disk`) with a column of encoded images, read by offset as shards.

The image column is the first with the feature Image, else one named image, img or jpg: a struct with the field `bytes`,
or binary. The label column is the first with the feature ClassLabel, else one named label.
Format of the description in the schema: https://huggingface.co/docs/datasets/about_arrow
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.names import to_text
from data.sources.classes import label_text
from data.sources.shards import ShardContents

# pyarrow is imported in the functions, because most runs do not need it and would wait for the import.


class Columns(NamedTuple):
    """Names of the columns, and names of the classes if the schema has them."""

    image: str
    label: str | None
    classes: list[str] | None


def find_columns(schema: Any, file: Path) -> Columns:
    """Return the columns in a pyarrow schema. Raises ValueError if there is no image column."""
    import pyarrow as pa

    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (described.get("info") or {}).get("features") or {}
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [name for name in schema.names if kinds.get(name) == "Image"]
    images += [name for name in ("image", "img", "jpg") if name in schema.names]
    if not images:
        raise ValueError(f"{file} has no column of images, only {', '.join(schema.names)}")
    labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    labels += [name for name in ("label",) if name in schema.names]
    # A list of labels, or an image as of a data set for segmentation, says no class.
    label = next((name for name in labels if not pa.types.is_nested(schema.field(name).type)), None)
    classes = features[label].get("names") if label in kinds else None
    return Columns(images[0], label, [to_text(name) for name in classes] if classes else None)


def image_bytes(column: Any, file: Path) -> Any:
    """Return the (large) binary array of an image column. Raises ValueError if the column has another type."""
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        if column.type.get_field_index("bytes") < 0:
            raise ValueError(f"{file}: the column of images has no field 'bytes'")
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{file}: the column of images holds {column.type}, it must hold encoded images (binary)")
    return column


def encode_labels(column: Any) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct labels of a column as text, and each row's index into them; -1 for a row without a label."""
    encoded = column.dictionary_encode()
    texts = [label_text(value) for value in encoded.dictionary.to_pylist()]
    codes: dict[str, int] = {}
    index = np.array([-1 if text is None else codes.setdefault(text, len(codes)) for text in texts] + [-1])
    rows = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return list(codes), index[rows]


def scan_arrow(file: Path) -> ShardContents:
    """List the images in an Arrow file. Raises ValueError if it is damaged or compressed, or has no images."""
    import pyarrow as pa

    keys: list[str] = []
    none = np.empty(0, np.int64)
    labels, starts, sizes = [none], [none], [none]
    try:
        with pa.memory_map(str(file)) as mapped:
            base = mapped.read_buffer().address
            mapped.seek(0)
            schema, batches = _open(mapped)
            columns = find_columns(schema, file)
            for batch in batches:
                images = image_bytes(batch.column(columns.image), file)
                if images.null_count:
                    raise ValueError(f"{file}: {images.null_count} rows have no bytes: save the images inside the file")
                _, offsets, data = images.buffers()
                if not data:
                    if len(images):
                        raise ValueError(f"{file}: all of {len(images)} images are empty")
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
                    batch_keys, batch_labels = encode_labels(batch.column(columns.label))
                labels.append(np.where(batch_labels < 0, -1, batch_labels + len(keys)))
                keys += batch_keys
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not an Arrow file, or damaged: {error}") from error
    names = [str(row) for row in range(sum(map(len, starts)))]
    arrays = np.concatenate(labels), np.concatenate(starts), np.concatenate(sizes)
    return ShardContents(names, keys, *arrays, classes=columns.classes)


def _open(mapped: Any) -> tuple[Any, Any]:
    """Return schema and record batches of the streaming format, which `datasets` writes, or of the file format."""
    import pyarrow as pa

    magic = mapped.read(6)
    mapped.seek(0)
    if magic != b"ARROW1":
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, stream
    file = pa.ipc.open_file(mapped)
    return file.schema, map(file.get_batch, range(file.num_record_batches))
