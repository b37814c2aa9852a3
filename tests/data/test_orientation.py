"""Images with an orientation, wherever the file has it: both backends show them upright, as Pillow does."""

import io
import struct
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.decode import decode
from data.loader import train_batches
from data.reader import jpeg_size
from data.sources.open import open_source
from data.views import Augment, View
from tests.data.images import photograph
from tests.data.settings import CPU, data_settings

PICTURE = Image.fromarray(photograph(60, 90))


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, kind, **options)
    return file.getvalue()


def segment(marker: int, contents: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(contents) + 2) + contents


def exif(orientation: int, order: Literal["<", ">"] = ">") -> bytes:
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    entry = struct.pack(order + "HHHIHH", 1, 0x0112, 3, 1, orientation, 0)
    return segment(0xE1, b"Exif\0\0" + head + entry + bytes(4))


def xmp(text: str = "") -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta " + text.encode() + b"/>")


PLAIN = saved("JPEG", quality=95)
PROFILE = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 3]) + bytes(65_000)) for i in (1, 2, 3))
COMMENTS = segment(0xFE, b"x" * 65_000) * 2
BEFORE = {  # segments before the rest of a JPEG
    "big endian": exif(6),
    "little endian": exif(6, "<"),
    "after a long profile": PROFILE + exif(8),
    "after long comments": COMMENTS + exif(3, "<"),
    "XMP first": xmp() + exif(5),
    "XMP of another orientation first": xmp('tiff:Orientation="3"') + exif(6),
    "XMP only": xmp('tiff:Orientation="6"'),
    "two EXIF segments": exif(6) + exif(3),
    "EXIF without an orientation, then XMP": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6)) + xmp(),
    "padding": b"\xff\xff" + exif(7),
    "damaged": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xffbroken"),
    "not EXIF": segment(0xE1, b"Exif\0\0brokenxx"),
    "of no orientation": exif(77),
    "in the profile": segment(0xE2, b"ICC_PROFILE\0\1\1" + exif(6)),
}


def jpegs() -> dict[str, bytes]:
    """Return JPEGs with the segments at the start, and after the header of JFIF."""
    end = 4 + int.from_bytes(PLAIN[4:6], "big")
    assert PLAIN[2:4] == b"\xff\xe0"
    assert PLAIN[end:][:1] == b"\xff"
    return {name: PLAIN[:2] + before + PLAIN[2:] for name, before in BEFORE.items()} | {
        f"{name}, after JFIF": PLAIN[:end] + before + PLAIN[end:] for name, before in BEFORE.items()
    }


def others() -> dict[str, bytes]:
    """Return files of other formats with an orientation."""

    def tag(orientation: int = 6) -> Image.Exif:
        tag = Image.Exif()
        tag[0x0112] = orientation
        return tag

    files = {kind: saved(kind, exif=tag()) for kind in ("PNG", "TIFF", "AVIF")}  # AVIF turns by irot and imir
    files["AVIF, mirrored"] = saved("AVIF", exif=tag(7))
    files["WEBP"] = saved("WEBP", exif=tag(), lossless=True)
    return files


def pillow(data: bytes) -> NDArray[np.uint8]:
    picture: Image.Image = Image.open(io.BytesIO(data))
    with suppress(SyntaxError, struct.error):  # damaged EXIF data
        picture = ImageOps.exif_transpose(picture)
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("name", [*jpegs(), *others()])
def test_decoded_upright(name: str) -> None:
    data = {**jpegs(), **others()}[name]
    ours, theirs = decode(data), pillow(data)
    assert ours.shape == theirs.shape
    assert (ours == theirs).all()


def test_the_files_are_turned() -> None:
    turned = {name for name, data in {**jpegs(), **others()}.items() if decode(data).shape == (90, 60, 3)}
    expected = {"big endian", "little endian", "after a long profile", "XMP first", "XMP of another orientation first"}
    expected |= {"XMP only", "two EXIF segments", "padding"}
    assert turned == expected | {f"{name}, after JFIF" for name in expected} | others().keys()


def test_the_avif_file_says_so_in_its_boxes() -> None:
    """Orientation of the file format itself (irot, imir), not EXIF data."""
    files = others()
    assert b"irot" in files["AVIF"]
    assert b"imir" in files["AVIF, mirrored"]
    assert b"Exif" not in files["AVIF"] + files["AVIF, mirrored"]


def test_both_backends_show_the_same(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name, data in {**jpegs(), **others()}.items():
        (tmp_path / "c" / f"{name}.jpg").write_bytes(data)
    source = open_source(tmp_path)
    settings = data_settings(views=(View(size=32),), augment=Augment(blur=0), batch_size=len(source))
    ours, theirs = (
        next(train_batches(source, settings.model_copy(update={"backend": b}), 0, 0, 1, 0, 1, CPU))
        for b in ("dali", "cpu")
    )
    assert ours.unreadable == theirs.unreadable == []
    distance = (ours.views[0].float() - theirs.views[0].float()).abs().mean((1, 2, 3))
    assert {source.name(i): d for i, d in zip(ours.samples.tolist(), distance.tolist(), strict=True) if d > 2} == {}
    assert sum(jpeg_size(data) is not None for data in jpegs().values()) > 10, "DALI decodes most of them"
