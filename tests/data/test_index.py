import gzip
import io
import os
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.decode import decode
from data.sources.base import UnreadableImage
from data.sources.folder import ImageFolder
from data.sources.idx import IdxImages
from data.sources.open import open_source
from tests.data.images import photograph, write_folder


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(source: ImageFolder | IdxImages) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def folder(root: Path, index: Path | None = None) -> ImageFolder:
    source = open_source(root, index)
    assert isinstance(source, ImageFolder)
    return source


# Folders


def test_folder_of_classes(tmp_path: Path) -> None:
    source = folder(write_folder(tmp_path / "data", classes=2, per_class=3))
    assert source.classes == ["c0", "c1"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.labels.dtype == np.int64
    assert names(source) == ["c0/0.png", "c0/1.png", "c0/2.png", "c1/0.png", "c1/1.png", "c1/2.png"]
    assert (source.image(4) == photograph(41, 42, seed=4)).all()


def test_nested_hidden_and_other_files(tmp_path: Path) -> None:
    touch(
        tmp_path / "b" / "deep" / "er" / "1.jpg",
        tmp_path / "b" / "0.JPEG",
        tmp_path / "b" / "z.webp",
        tmp_path / "b" / "looks_like.png" / "2.bmp",  # a folder
        tmp_path / "a" / "x.png",
        tmp_path / "a" / ".hidden.png",
        tmp_path / "a" / ".thumbnails" / "x.png",
        tmp_path / "a" / "notes.txt",
        tmp_path / "a" / "jpg",
        tmp_path / ".git" / "x.png",
        tmp_path / "README.md",
    )
    (tmp_path / "empty").mkdir()
    source = folder(tmp_path)
    assert source.classes == ["a", "b"]
    assert names(source) == ["a/x.png", "b/0.JPEG", "b/deep/er/1.jpg", "b/looks_like.png/2.bmp", "b/z.webp"]
    assert source.labels.tolist() == [0, 1, 1, 1, 1]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    for name in ("10", "9", "a", "B", "é", "-"):
        touch(tmp_path / "c" / f"{name}.png")
    assert names(folder(tmp_path)) == [f"c/{name}.png" for name in ("-", "10", "9", "B", "a", "é")]


def test_loose_images_are_one_class(tmp_path: Path) -> None:
    touch(tmp_path / "mine" / "2.png", tmp_path / "mine" / "1.jpg")
    (tmp_path / "mine" / "empty").mkdir()
    source = folder(tmp_path / "mine")
    assert source.classes == ["mine"]
    assert names(source) == ["1.jpg", "2.png"]
    assert source.labels.tolist() == [0, 0]


def test_loose_images_beside_classes_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "1.png", tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"class folders and outside.*stray\.png"):
        open_source(tmp_path)


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", classes=1, per_class=2)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "x").symlink_to(tmp_path / "real" / "c0")
    (tmp_path / "linked" / "y").mkdir()
    (tmp_path / "linked" / "y" / "gone.png").symlink_to(tmp_path / "nothing.png")
    source = folder(tmp_path / "linked")
    assert names(source) == ["x/0.png", "x/1.png", "y/gone.png"]
    assert (source.image(1) == photograph(41, 40, seed=1)).all()
    with pytest.raises(UnreadableImage, match=r"y/gone\.png: No such file"):
        source.image(2)


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing does not exist"):
        open_source(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no images"):
        open_source(tmp_path)
    touch(tmp_path / "a" / "notes.txt")
    with pytest.raises(ValueError, match="has no images"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="not named like IDX images"):
        open_source(tmp_path / "a" / "notes.txt")


def test_odd_names(tmp_path: Path) -> None:
    for name in (b"caf\xc3\xa9", b"latin \xe9", b"two\nlines", "犬".encode()):
        path = os.path.join(os.fsencode(tmp_path), b"kinds", name)
        os.makedirs(path)
        picture = cv2.imencode(".png", photograph(8, 8)[:, :, ::-1])[1].tobytes()
        with open(os.path.join(path, b"a=b c.png"), "wb") as file:
            file.write(picture)
    root = tmp_path / "kinds"
    scanned = folder(root, tmp_path / "index")
    loaded = folder(root, tmp_path / "index")
    for source in (scanned, loaded):
        assert source.classes == ["café", "latin \\xe9", "two\\nlines", "犬"]
        assert source.name(2) == "two\\nlines/a=b c.png"
        for i in range(4):
            assert (source.image(i) == photograph(8, 8)).all()


# The index


def test_index_is_used_instead_of_scanning(tmp_path: Path) -> None:
    root, index = write_folder(tmp_path / "data"), tmp_path / "runs" / "index.npz"
    first = folder(root, index)
    assert index.is_file()
    assert [p.name for p in index.parent.iterdir()] == ["index.npz"]  # no temporary file remains
    (root / "c0" / "0.png").rename(root / "c0" / "new.png")
    for path in (root, *root.iterdir()):
        os.utime(path, (0, 0))  # the time of the last change decides whether the folder is scanned again
    again = folder(root, index)
    assert (names(again), again.classes) == (names(first), first.classes)
    assert again.labels.tolist() == first.labels.tolist()
    assert (again.image(9) == first.image(9)).all()
    with pytest.raises(UnreadableImage, match=r"c0/0\.png"):
        again.image(0)
    assert "c0/new.png" in names(folder(root))


def test_index_of_another_folder_is_replaced(tmp_path: Path) -> None:
    index = tmp_path / "index"
    folder(write_folder(tmp_path / "a"), index)
    assert len(folder(write_folder(tmp_path / "b", classes=1), index)) == 8
    loaded = ImageFolder.load(index, tmp_path / "b")
    assert loaded is not None
    assert len(loaded) == 8


def test_index_knows_its_folder_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "data", classes=1, per_class=2)
    folder(root, tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    loaded = ImageFolder.load(tmp_path / "index", Path("data"))
    assert loaded is not None
    assert loaded.image(1).shape == (41, 40, 3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "byte"])
def test_damaged_index_is_replaced(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    root, index = write_folder(tmp_path / "data"), tmp_path / "index"
    expected = names(folder(root, index))
    good = index.read_bytes()
    at = good.index(b"c1/3.png")
    damaged = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"hello\n",
        "byte": good[:at] + b"x" + good[at + 1 :],
    }
    index.write_bytes(damaged[damage])
    assert names(folder(root, index)) == expected
    assert "is not an index of a folder" in caplog.text
    assert index.read_bytes() == good


def test_index_travels_to_workers_as_shared_memory(tmp_path: Path) -> None:
    source = folder(write_folder(tmp_path / "data"))
    small = len(bytes(ForkingPickler.dumps(source)))
    assert source._labels._tensor.is_shared()
    many = ImageFolder(Path("x"), ["c"], np.zeros(50_000, np.int64), np.zeros(100_000, np.uint8), np.arange(50_001) * 2)
    assert len(bytes(ForkingPickler.dumps(many))) < small + 1000
    assert len(many) == 50_000
    assert many.stored_name(7) == b"\0\0"


# Decoding


def encoded(picture: NDArray[np.uint8], kind: str, mode: str = "RGB", orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, kind, exif=exif, quality=90)
    return file.getvalue()


def pillows(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
        ("BMP", "RGB"),
    ],
)
def test_decode_equals_pillow(kind: str, mode: str) -> None:
    data = encoded(photograph(30, 50), kind, mode)
    ours = decode(data)
    assert ours.shape == (30, 50, 3)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - pillows(data)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    data = encoded(photograph(30, 50), kind, orientation=orientation)
    ours = decode(data)
    assert ours.shape == ((50, 30, 3) if orientation > 4 else (30, 50, 3))
    assert np.abs(ours.astype(int) - pillows(data)).max() <= 1


def test_jpeg_with_stray_bytes_is_read() -> None:
    data = encoded(photograph(30, 50), "JPEG")
    assert (decode(data[:-2] + bytes(20) + data[-2:]) == decode(data)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_cut_short_is_refused(kind: str, share: float) -> None:
    data = encoded(photograph(100, 120), kind)
    with pytest.raises(ValueError, match=r"damaged(,| or) cut short"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"hello", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not an image|damaged"):
        decode(data)


def test_unreadable_image_names_the_file_and_the_reason(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", classes=1, per_class=3)
    (root / "c0" / "0.png").write_bytes(b"")
    (root / "c0" / "1.png").write_bytes(b"GIF? no")
    source = folder(root)
    (root / "c0" / "2.png").unlink()
    for i, reason in enumerate(["the file is empty", "not an image", "No such file"]):
        with pytest.raises(UnreadableImage, match=rf"^c0/{i}\.png: {reason}"):
            source.image(i)


# IDX


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


PICTURES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([3, 0, 1, 3, 2], np.uint8)


def write_idx(root: Path, images: bytes = idx(PICTURES), labels: bytes = idx(LABELS), end: str = "") -> Path:
    path = root / f"t-images-idx3-ubyte{end}"
    path.write_bytes(images)
    (root / f"t-labels-idx1-ubyte{end}").write_bytes(labels)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_idx(tmp_path: Path, compress: bool) -> None:
    if compress:
        path = write_idx(tmp_path, gzip.compress(idx(PICTURES)), gzip.compress(idx(LABELS)), ".gz")
    else:
        path = write_idx(tmp_path)
    source = open_source(path)
    assert len(source) == 5
    assert source.classes == ["0", "1", "2", "3"]
    assert source.labels.tolist() == LABELS.tolist()
    assert source.labels.dtype == np.int64
    assert source.image(2).shape == (4, 3, 3)
    assert (source.image(2) == PICTURES[2][..., None]).all()
    assert source.name(2) == f"{path.name}[2]"


def test_idx_with_labels_of_the_other_compression(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    labels = tmp_path / "t-labels-idx1-ubyte"
    labels.with_name(labels.name + ".gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert open_source(path).labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(PICTURES)[:-1], idx(LABELS), r"images.* is damaged: its header says \[5, 4, 3\], so 60 bytes.*has 59"),
        (idx(PICTURES) + b"x", idx(LABELS), "images.* is damaged"),
        (idx(PICTURES), idx(LABELS)[:-2], "labels.* is damaged"),
        (idx(PICTURES)[:9], idx(LABELS), "must begin with 00000803 and 3 sizes, it begins with 000008030000000500"),
        (idx(LABELS), idx(LABELS), "images.* is not an IDX file"),
        (idx(PICTURES), idx(PICTURES), "labels.* is not an IDX file"),
        (b"", idx(LABELS), "is not an IDX file"),
        (gzip.compress(idx(PICTURES))[:-9], idx(LABELS), "cannot be read"),
        (b"\x1f\x8bnonsense", idx(LABELS), "cannot be read"),
        (idx(PICTURES), idx(LABELS[:4]), "5 images and t-labels-idx1-ubyte 4 labels"),
        (idx(PICTURES[:0]), idx(LABELS[:0]), "0 images"),
    ],
    ids=[
        "images a byte short",
        "images a byte long",
        "labels short",
        "header short",
        "labels for images",
        "images for labels",
        "empty",
        "gzip short",
        "gzip damaged",
        "fewer labels",
        "no samples",
    ],
)
def test_bad_idx(tmp_path: Path, images: bytes, labels: bytes, message: str) -> None:
    path = write_idx(tmp_path, images, labels)
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_idx_without_labels(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    (tmp_path / "t-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="needs its labels beside it, in t-labels-idx1-ubyte"):
        open_source(path)


def test_idx_with_names_of_classes(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    (tmp_path / "classes.txt").write_text("Coat\nT-shirt\nBag\nAnkle boot\n")
    assert IdxImages(path).classes == ["Coat", "T-shirt", "Bag", "Ankle boot"]
    (tmp_path / "classes.txt").write_text("Coat\nT-shirt\n")
    with pytest.raises(ValueError, match=r"classes.txt has 2 lines, but t-labels-idx1-ubyte has label 3"):
        IdxImages(path)
