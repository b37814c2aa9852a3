"""Shards, Arrow, Parquet, CIFAR: the images and labels that were written are read, and errors have one line."""

import io
import json
import re
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.decode import decode
from data.sources import files
from data.sources.base import LabelledSource, Source, UnreadableImage
from data.sources.folder import ImageFolder
from data.sources.open import open_source
from data.sources.parquet import ParquetFiles
from data.sources.shards import Shards
from tests.data.images import photograph, write_folder


def png(seed: int) -> bytes:
    return cv2.imencode(".png", photograph(12, 10 + seed, seed)[:, :, ::-1])[1].tobytes()


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def check(source: Source, pictures: list[bytes], labels: list[str]) -> None:
    """Assert that `source` has these images with these class names."""
    assert [source.read(i) for i in range(len(source))] == pictures
    assert all((source.image(i) == decode(p)).all() for i, p in enumerate(pictures))
    assert source.labels.dtype == np.int64
    assert [source.classes[label] for label in source.labels] == labels


# Tar shards

LABELS: dict[str, dict[str, bytes]] = {
    "cls before the picture": {"a/0.cls": b"7\n", "a/0.png": png(0), "a/1.cls": b"10", "a/1.png": png(1)},
    "json after the picture": {
        "0.png": png(0), "0.json": b'{"label": 7}', "1.png": png(1), "1.json": b'{"label": "10", "x": [1]}'},
    "cls beats json": {"0.png": png(0), "0.cls": b"7", "0.json": b'{"label": 1}', "1.json": b"{}",
                       "1.cls": b"10", "1.png": png(1)},
    "cls beats the folder": {"x/0.png": png(0), "x/0.cls": b"7", "y/1.png": png(1), "y/1.cls": b"10"},
    "folder": {"./7/0.png": png(0), "deep/10/0.PNG": png(1)},
    "dots": {"7/a.b.0.png": png(0), "10/a.b.1.png": png(1)},
    "other members": {"7/.hidden.png": b"", "7/a.txt": b"text", "7/0.png": png(0), "10/1.png": png(1)},
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_a_shard(tmp_path: Path, name: str) -> None:
    source = open_source(write_tar(tmp_path / "x.tar", LABELS[name]))
    check(source, [png(0), png(1)], ["7", "10"])
    assert source.classes == ["7", "10"]  # as numbers, not as text


def test_shards_without_labels_are_one_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", {"0.png": png(0), "1.png": png(1)})
    write_tar(tmp_path / "x-1.tar", {})
    write_tar(tmp_path / "x-2.tar", {"0.png": png(2), "0.cls": b"-1", "0.json": b'{"label": -1}'})
    source = open_source(tmp_path)
    check(source, [png(0), png(1), png(2)], [tmp_path.name] * 3)
    assert [source.name(i) for i in range(3)] == ["x-0.tar/0.png", "x-0.tar/1.png", "x-2.tar/0.png"]


def test_classes_over_shards_and_their_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", {"0.png": png(0), "0.cls": b"2"})
    write_tar(tmp_path / "x-1.tar", {"1.png": png(1), "1.cls": b"0"})
    check(open_source(tmp_path), [png(0), png(1)], ["2", "0"])
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird of prey\n")
    source = open_source(tmp_path)
    assert source.classes == ["cat", "dog", "bird of prey"]
    check(source, [png(0), png(1)], ["bird of prey", "cat"])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="has a label 2, but only 2 class names"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names(tmp_path: Path, kind: int) -> None:
    names = [f"{'d' * 60}/{'n' * 90}.png", f"{'e' * 60}/é 犬.png"]
    source = open_source(write_tar(tmp_path / "x.tar", {names[0]: png(0), names[1]: png(1)}, kind))
    check(source, [png(0), png(1)], ["d" * 60, "e" * 60])
    assert source.name(1) == f"x.tar/{names[1]}"


def test_some_labels_only(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": png(0), "0.cls": b"2", "1.png": png(1), "2.png": png(2)})
    with pytest.raises(ValueError, match=r"x\.tar: 2 of 3 images have no label: label all, or none"):
        open_source(tmp_path / "x.tar")


def damaged_tar(path: Path, how: str) -> None:
    members = {f"c/{i}.png": png(i) for i in range(4)}
    write_tar(path, members)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    if how == "cut in a picture":
        del data[third.offset_data + 9 :]
    elif how == "cut in a header":
        del data[third.offset + 9 :]
    elif how == "header":
        data[third.offset + 3] ^= 255
    elif how == "first header":
        data[3] ^= 255
    elif how == "gzip":
        with tarfile.open(path, "w:gz"):
            pass
        return
    elif how == "text":
        data = bytearray(b"hello\n" * 1000)
    elif how == "nothing":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["cut in a picture", "cut in a header", "header", "first header", "gzip", "text", "nothing"]
)
def test_a_damaged_shard_is_refused_when_it_is_listed(tmp_path: Path, how: str) -> None:
    damaged_tar(tmp_path / "x.tar", how)
    with pytest.raises(ValueError, match=r"x\.tar is damaged, cut short, or not an uncompressed tar.*[^\n]$"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize("label", [{"0.cls": b"\xff\xfe"}, {"0.json": b"{"}, {"0.json": b"\xff"}])
def test_a_damaged_label_is_refused(tmp_path: Path, label: dict[str, bytes]) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": png(0), **label})
    with pytest.raises(ValueError, match=r"x\.tar is damaged.*0\.(cls|json) is not"):
        open_source(tmp_path / "x.tar")


def test_images_that_disappear_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DELAYS", (0, 0))
    path = write_tar(tmp_path / "x.tar", {"c/0.png": png(0), "c/1.png": b"", "c/2.png": b"no", "c/3.png": png(3)})
    source = open_source(path)
    for i, reason in ((1, "the file is empty"), (2, "not an image")):
        with pytest.raises(UnreadableImage, match=rf"^x\.tar/c/{i}\.png: {reason}"):
            source.image(i)
    with path.open("r+b") as file:
        file.truncate(path.read_bytes().index(png(3)) + 9)
    with pytest.raises(UnreadableImage, match=r"^x\.tar/c/3\.png: .*ends \d+ bytes before"):
        source.image(3)
    files._open.cache_clear()
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"^x\.tar/c/0\.png: No such file"):
        source.image(0)


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(150):
        write_tar(tmp_path / f"{k:03d}.tar", {f"{k}.png": png(k % 5)})
    source = open_source(tmp_path)
    check(source, [png(k % 5) for k in range(150)], [tmp_path.name] * 150)
    assert files._open.cache_info().currsize <= 128


# The files that a path stands for


def test_patterns(tmp_path: Path) -> None:
    for k in range(8, 12):
        write_tar(tmp_path / f"train-{k:02d}.tar", {f"{k}.png": png(k)})
    for pattern, expected in (("train-*.tar", [8, 9, 10, 11]), ("train-{09..10}.tar", [9, 10]), ("*-?8.tar", [8])):
        source = open_source(tmp_path / pattern)
        assert [source.name(i) for i in range(len(source))] == [f"train-{k:02d}.tar/{k}.png" for k in expected]
    with pytest.raises(ValueError, match=r"train-12\.tar does not exist"):
        open_source(tmp_path / "train-{11..13}.tar")
    with pytest.raises(ValueError, match=r"val-\*\.tar does not exist"):
        open_source(tmp_path / "val-*.tar")


def test_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00.tar", "train-01.tar", "val-00.tar"):
        write_tar(tmp_path / name, {"c/0.png": png(0)})
    with pytest.raises(ValueError, match=r"holds train-\*\.tar, val-\*\.tar: give the pattern of one"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "train-*.tar")) == 2


def test_shards_beside_folders_of_images_are_ignored(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=2, per_class=2)
    write_tar(tmp_path / "c0.tar", {"0.png": png(0)})
    assert isinstance(open_source(tmp_path), ImageFolder)


# The index


def test_index_of_shards(tmp_path: Path) -> None:
    shards, index = tmp_path / "shards", tmp_path / "index.npz"
    shards.mkdir()
    for k in range(3):
        write_tar(shards / f"{k}.tar", {f"{c}/{k}.png": png(k) for c in "ab"})
    first = open_source(shards, index)
    once_more = open_source(shards, index)
    write_tar(shards / "3.tar", {"c/3.png": png(3)})  # not in the index
    for again in (once_more, open_source(index)):
        assert isinstance(again, Shards)
        check(again, [png(0), png(0), png(1), png(1), png(2), png(2)], ["a", "b"] * 3)
        assert [again.name(i) for i in range(6)] == [first.name(i) for i in range(6)]
        left = again.without([1, 4])
        check(left, [png(0), png(1), png(1), png(2)], ["a", "a", "b", "b"])
    assert len(open_source(shards, index)) == 7
    write_tar(shards / "1.tar", {"a/x.png": bytes(20_000)})
    with pytest.raises(ValueError, match=r"1\.tar has \d+ bytes, and had \d+ when its index was made"):
        open_source(index)
    assert len(open_source(shards, index)) == 6  # the list that a run keeps for itself is made again
    assert len(open_source(index)) == 6
    (shards / "1.tar").unlink()
    assert len(open_source(shards, index)) == 5


def test_index_with_labels_of_any_text(tmp_path: Path) -> None:
    labels = ["a/b", "two\nlines", "é", "c"]
    members = {f"{i}{end}": data for i, label in enumerate(labels) for end, data in
               ((".png", png(i)), (".json", json.dumps({"label": label}).encode()))}  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    texts = ["a/b", "two\\nlines", "é", "c"]
    check(open_source(tmp_path / "x.tar", tmp_path / "index.npz"), [png(i) for i in range(4)], texts)
    check(open_source(tmp_path / "index.npz"), [png(i) for i in range(4)], texts)
    write_tar(tmp_path / "x.tar", {"0.png": png(0), "0.json": b'{"label": "a\\u0000b"}'})
    with pytest.raises(ValueError, match="labels with a NUL"):
        open_source(tmp_path / "x.tar")


def test_index_of_a_folder_as_a_data_set(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", classes=2, per_class=3)
    open_source(folder, tmp_path / "index.npz")
    source = open_source(tmp_path / "index.npz")
    assert isinstance(source, ImageFolder)
    assert (source.image(4) == photograph(41, 42, seed=4)).all()
    left = source.without([0, 5])
    assert [left.name(i) for i in range(4)] == ["c0/1.png", "c0/2.png", "c1/0.png", "c1/1.png"]
    assert left.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "index.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="is not an index of a folder or of shards"):
        open_source(tmp_path / "index.npz")
    np.savez(tmp_path / "index.npz", x=np.arange(3))
    with pytest.raises(ValueError, match="is not an index"):
        open_source(tmp_path / "index.npz")


class Labels(LabelledSource):
    """A source without images."""

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> bytes:
        return b""


def test_labels_that_are_kept_outlive_the_move_to_shared_memory() -> None:
    labels = np.arange(50_000)
    source = Labels(["a"], labels.copy())
    kept = source.labels
    ForkingPickler.dumps(source)
    others = [np.full_like(labels, -1) for _ in range(4)]  # they get the memory of the labels if it is free
    assert np.array_equal(kept, labels)
    assert np.array_equal(source.labels, labels)
    assert source._labels._tensor.is_shared()
    del others


def test_sources_travel_to_workers(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {f"c/{i}.png": png(i) for i in range(4)})
    source = open_source(tmp_path / "x.tar")
    source.read(0)
    small = len(bytes(ForkingPickler.dumps(source)))
    many = open_source(write_tar(tmp_path / "y.tar", {f"c/{i:05d}.png": b"x" for i in range(2000)}))
    assert len(bytes(ForkingPickler.dumps(many))) < small + 200


# Hugging Face

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def table(features: dict[str, Any] = FEATURES, labels: tuple[int | None, ...] = (1, 0, 1, 1, 0)) -> pa.Table:
    """Return a table of five images with the description that `datasets` writes."""
    images = pa.array([{"bytes": png(i), "path": None} for i in range(5)])
    columns = {"other": pa.array(["x"] * 5), "image": images, "label": pa.array(labels, pa.int64())}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(described)


def write_arrow(path: Path, data: pa.Table, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.schema, **options) as writer:
        writer.write_table(data, max_chunksize=2)
    return path


def write_parquet(path: Path, data: pa.Table) -> Path:
    pq.write_table(data, path, row_group_size=2)
    return path


WRITERS = {"arrow": write_arrow, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_hugging_face(tmp_path: Path, kind: str) -> None:
    for part in range(2):
        WRITERS[kind](tmp_path / f"data-0000{part}-of-00002.{kind}", table())
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    WRITERS[kind](tmp_path / f"cache-0123.{kind}", table())
    source = open_source(tmp_path, tmp_path / ".index.npz")
    check(source, [png(i) for i in range(5)] * 2, ["dog", "cat", "dog", "dog", "cat"] * 2)
    assert source.classes == ["cat", "dog"]
    assert source.name(8).startswith(f"data-00001-of-00002.{kind}/")
    assert len({source.name(i) for i in range(10)}) == 10


@pytest.mark.parametrize("kind", WRITERS)
def test_hugging_face_without_a_description(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"x.{kind}", table().replace_schema_metadata(None))
    check(open_source(path), [png(i) for i in range(5)], ["1", "0", "1", "1", "0"])
    binary = pa.table({"img": pa.array([png(i) for i in range(5)], pa.large_binary())})
    source = open_source(WRITERS[kind](path, binary))
    check(source, [png(i) for i in range(5)], [source.classes[0]] * 5)


@pytest.mark.parametrize("kind", WRITERS)
def test_hugging_face_without_labels(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"x.{kind}", table(labels=(-1, -1, None, -1, -1)))
    assert open_source(path).classes == [f"x.{kind}"]
    WRITERS[kind](path, table(labels=(0, -1, 1, None, 1)))
    with pytest.raises(ValueError, match="2 of 5 images have no label"):
        open_source(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_hugging_face_refusals(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    for data, message in (
        (pa.table({"text": ["a"]}), "no column of images, only text"),
        (pa.table({"image": [[1, 2]]}), "holds list<.*int64>, it must hold encoded images"),
        (pa.table({"image": [{"path": "x"}]}), "has no field 'bytes'"),
    ):
        WRITERS[kind](path, data)
        with pytest.raises(ValueError, match=message):
            open_source(path)
    WRITERS[kind](path, table())
    good = path.read_bytes()
    for damaged in (b"", b"hello", good[: len(good) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"x\.{kind} (is not|has no)"):
            open_source(path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("feature", [{"_type": "Image"}, [{"_type": "Value"}], None])
def test_labels_that_are_no_classes_are_ignored(tmp_path: Path, kind: str, feature: Any) -> None:
    labels = [{"bytes": png(5), "path": None}] * 2 if feature == {"_type": "Image"} else [[1, 2], [3]]
    described = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})}
    data = pa.table({"image": pa.array([{"bytes": png(i)} for i in range(2)]), "label": pa.array(labels)})
    source = open_source(WRITERS[kind](tmp_path / f"x.{kind}", data.replace_schema_metadata(described)))
    assert [source.read(i) for i in range(2)] == [png(0), png(1)]
    assert len(source.classes) == 1


def test_images_outside_of_their_file(tmp_path: Path) -> None:
    outside = pa.table({"image": pa.array([{"bytes": None, "path": "/data/0.png"}, {"bytes": png(1), "path": None}])})
    with pytest.raises(ValueError, match="1 rows have no bytes"):
        open_source(write_arrow(tmp_path / "x.arrow", outside))
    source = open_source(write_parquet(tmp_path / "x.parquet", outside))  # found only when the image is read
    assert source.read(1) == png(1)
    with pytest.raises(UnreadableImage, match=r"^x\.parquet/0/0: the row has no bytes"):
        source.read(0)


def test_compressed_arrow_is_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "x.arrow", table(), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(ValueError, match="is compressed"):
        open_source(path)


def test_arrow_file_format(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_file(file, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    check(open_source(tmp_path / "x.arrow"), [png(i) for i in range(5)], ["dog", "cat", "dog", "dog", "cat"])


def test_several_splits(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_arrow(tmp_path / "train" / "data-00000-of-00001.arrow", table())
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        ValueError, match=r"holds several data sets \(\{\"splits\": \[\"train\", \"test\"\]\}\): give one"
    ):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "train")) == 5


def test_images_of_damaged_row_groups_are_unreadable(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", table())
    source = open_source(path)
    assert isinstance(source, ParquetFiles)
    group = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    assert source.image(0).shape == (12, 10, 3)
    with pytest.raises(UnreadableImage, match=r"^x\.parquet/1/0: "):
        source.image(2)
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"^x\.parquet/2/0: "):
        source.image(4)


def test_cached_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.sources import parquet

    source = open_source(write_parquet(tmp_path / "x.parquet", table()))
    parquet._cache.clear()
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    for i in (0, 2, 4, 1):
        assert source.read(i) == png(i)
        assert len(parquet._cache) == 1


# CIFAR


def cifar_records(seed: int, count: int, label_bytes: int, classes: int) -> bytes:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (count, label_bytes))
    pixels = rng.integers(0, 256, (count, 3072))
    return np.concatenate([labels, pixels], axis=1).astype(np.uint8).tobytes()


def test_cifar_10(tmp_path: Path) -> None:
    parts = [cifar_records(k, 4, 1, 10) for k in range(1, 6)]
    for k, part in enumerate(parts, 1):
        (tmp_path / f"data_batch_{k}.bin").write_bytes(part)
    (tmp_path / "test_batch.bin").write_bytes(cifar_records(9, 3, 1, 10))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    (tmp_path / "readme.html").write_text("")
    train, test = open_source(tmp_path), open_source(tmp_path / "test_batch.bin")
    assert (len(train), len(test)) == (20, 3)
    assert train.classes == test.classes == names
    assert train.name(6) == "data_batch_2.bin[2]"
    record = np.frombuffer(parts[1], np.uint8).reshape(4, 3073)[2]
    assert train.labels[6] == record[0]
    image = train.image(6)
    assert image.shape == (32, 32, 3)
    assert image.flags.c_contiguous
    for y, x, c in ((0, 0, 0), (3, 5, 1), (31, 30, 2)):
        assert image[y, x, c] == record[1 + 1024 * c + 32 * y + x]


def test_cifar_100(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(cifar_records(1, 5, 2, 100))
    (tmp_path / "test.bin").write_bytes(cifar_records(2, 2, 2, 100))
    (tmp_path / "fine_label_names.txt").write_text("".join(f"fine{k}\n" for k in range(100)))
    source = open_source(tmp_path)
    assert len(source) == 5
    assert source.labels.tolist() == np.frombuffer((tmp_path / "train.bin").read_bytes(), np.uint8)[1::3074].tolist()
    assert source.classes[7] == "fine7"
    assert len(open_source(tmp_path / "test.bin")) == 2


def test_bad_cifar(tmp_path: Path) -> None:
    for name, data, message in (
        ("test_batch.bin", bytes(3072), "is damaged: 3072 bytes are not records of 3073"),
        ("test.bin", bytes(3073), "not records of 3074"),
        ("test_batch.bin", b"", "is damaged"),
        ("other.bin", bytes(3073), "is not named like CIFAR"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)


def test_errors_have_one_line(tmp_path: Path) -> None:
    for name in ("x.zip", "x.tar.gz", "x.lmdb"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            open_source(tmp_path / name)
        assert "\n" not in str(caught.value)
