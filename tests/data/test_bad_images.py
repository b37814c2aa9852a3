"""Damaged and unusual image files: each is decoded as by Pillow, or refused; nothing crashes.

The table of docs/data.md.
"""

import io
import zlib
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.decode import decode
from data.loader import train_batches
from data.sources.open import open_source
from data.views import View
from tests.data.images import photograph
from tests.data.settings import CPU, data_settings

PICTURE = photograph(30, 50)
RGB = Image.fromarray(PICTURE)
HIGH, LOW = PICTURE.astype(np.uint16) << 8, 77


def saved(picture: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_alpha() -> Image.Image:
    picture = RGB.convert("RGBA")
    picture.putalpha(Image.fromarray(PICTURE[..., 0]))
    return picture


def claiming(size: int) -> bytes:
    """Return a JPEG of a few bytes whose header claims size x size pixels."""
    data = bytearray(saved(RGB, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = size.to_bytes(2, "big") * 2
    return bytes(data)


def with_checksums(png: bytes) -> bytes:
    """Give the chunks of a PNG valid checksums, because a decoder stops at the first invalid one."""
    parts, place = [png[:8]], 8
    while place + 12 <= len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place + 4 : place + 8 + size]
        parts += [png[place : place + 4], chunk, zlib.crc32(chunk).to_bytes(4, "big")]
        place += 12 + size
    return b"".join(parts)


def ycck() -> bytes:
    """Return a CMYK JPEG whose marker says that its colours are YCCK."""
    data = bytearray(saved(RGB.convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


JPEG, PNG = saved(RGB, "JPEG"), saved(RGB, "PNG")
MOVING: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - PICTURE)]}

# File name and contents.
AS_PILLOW = {
    "jpeg.jpg": JPEG,
    "progressive.jpg": saved(RGB, "JPEG", progressive=True),
    "a PNG.jpg": PNG,
    "a JPEG.png": JPEG,
    "a TIFF.jpg": saved(RGB, "TIFF"),
    "stray bytes at the end.jpg": JPEG + bytes(1000),
    "no JFIF header.jpg": JPEG[:2] + JPEG[20:],
    "stray bytes between markers.jpg": JPEG[:20] + b"\0\0\0stray" + JPEG[20:],
    "two pictures.jpg": saved(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)]),
    "YCCK.jpg": ycck(),
    "stored as RGB.jpg": saved(RGB, "JPEG", keep_rgb=True),
    "YCbCr that claims RGB.jpg": JPEG[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + JPEG[20:],
    "damaged profile.jpg": saved(RGB, "JPEG", icc_profile=b"nonsense"),
    "fax.tif.jpg": saved(RGB.convert("1"), "TIFF", compression="group4"),
    "Lab.tif.jpg": saved(RGB.convert("LAB"), "TIFF"),
    "AVIF.jpg": saved(RGB, "AVIF"),
    "JPEG 2000.jpg": saved(RGB, "JPEG2000"),
    "palette with alpha.png": saved(RGB.quantize(32), "PNG", transparency=bytes(range(32))),
    "4 bits.png": saved(RGB.quantize(16), "PNG", bits=4),
    "without an end.png": PNG[:-12],
    "CMYK.jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "grey.jpg": saved(RGB.convert("L"), "JPEG"),
    "grey.png": saved(RGB.convert("L"), "PNG"),
    "bilevel.png": saved(RGB.convert("1"), "PNG"),
    "16 bit RGB.png": cv2.imencode(".png", HIGH | LOW)[1].tobytes(),
    "16 bit RGBA.png": cv2.imencode(".png", np.dstack([HIGH | LOW, HIGH[..., :1]]))[1].tobytes(),
    "1x1.jpg": saved(PICTURE[:1, :1], "JPEG"),
    "1x1.png": saved(PICTURE[:1, :1], "PNG"),
    "20000x20.jpg": saved(photograph(20, 20_000), "JPEG"),
    "20x20000.png": saved(photograph(20_000, 20), "PNG"),
    "rotated by EXIF.jpg": saved(RGB, "JPEG", exif=rotated_exif()),
    "animated.webp": saved(RGB, "WEBP", lossless=True, **MOVING),
    "animated.png": saved(RGB, "PNG", **MOVING),
    "an animated GIF.png": saved(RGB, "GIF", **MOVING),
    "alpha.png": saved(with_alpha(), "PNG"),
    "alpha.webp": saved(with_alpha(), "WEBP", lossless=True),
    "grey with alpha.png": saved(with_alpha().convert("LA"), "PNG"),
    "palette with a transparent colour.png": saved(RGB.quantize(16), "PNG", transparency=3),
}
REFUSED = {
    "cut short.jpg": JPEG[: len(JPEG) // 2],
    "cut short.png": PNG[:-60],
    "header only.jpg": JPEG[:20],
    "no bytes.jpg": b"",
    "zeros.jpg": bytes(5000),
    "without an end.jpg": JPEG[:-2],
    "no frame.jpg": b"\xff\xd8\xff\xd9",
    "a web page.jpg": b"<!DOCTYPE html><html>404</html>",
    "an SVG.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "damaged inside.jpg": JPEG[:400] + b"\x12\x34\x56" + JPEG[403:],
    "claims 60000 x 60000 pixels.jpg": claiming(60_000),
    "claims 65535 x 65535 pixels.jpg": claiming(65_535),
    "claims 60000 x 60000 pixels.png": with_checksums(PNG[:16] + (60_000).to_bytes(4, "big") * 2 + PNG[24:]),
    "claims 60000 x 60000 pixels.bmp": saved(RGB, "BMP")[:18]
    + (60_000).to_bytes(4, "little") * 2
    + saved(RGB, "BMP")[26:],
}


def decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("name", AS_PILLOW)
def test_decoded_as_by_pillow(name: str) -> None:
    ours, theirs = decode(AS_PILLOW[name]), decode_with_pillow(AS_PILLOW[name])
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= (1 if name in ("CMYK.jpg", "YCCK.jpg") else 0)


def test_16_bit_grey_keeps_its_high_byte() -> None:
    """This is the only difference: Pillow clips values above 255."""
    assert (decode(saved(HIGH[..., 0] | LOW, "PNG")) == PICTURE[..., :1]).all()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both(name: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        decode(REFUSED[name])
    if not name.endswith(".bmp"):  # Pillow decodes it and finds it cut short
        with pytest.raises((OSError, Image.DecompressionBombError, SyntaxError)):
            decode_with_pillow(REFUSED[name])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_all_in_one_epoch(tmp_path: Path, backend: Literal["cpu", "dali"], workers: int) -> None:
    (tmp_path / "c").mkdir()
    for name, data in {**AS_PILLOW, **REFUSED}.items():
        (tmp_path / "c" / name).write_bytes(data)
    source = open_source(tmp_path)
    count = len(AS_PILLOW) + len(REFUSED)
    views = (View(size=32), View(size=16, scale=(0.05, 0.14)))
    settings = data_settings(views=views, batch_size=count, workers=workers, backend=backend)
    (batch,) = train_batches(source, settings, 0, 0, 1, 0, 1, CPU)
    assert [v.shape for v in batch.views] == [(count, 32, 32, 3), (count, 16, 16, 3)]
    assert {source.name(i) for i, _ in batch.unreadable} == {f"c/{name}" for name in REFUSED}
    assert {source.name(i) for i in batch.samples.tolist()} == {f"c/{name}" for name in AS_PILLOW}


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file as disks, networks and people do."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not changed:
            break
        start, size = int(rng.integers(len(changed))), int(rng.integers(1, 40))
        match rng.integers(6):
            case 0:
                changed[start] ^= 1 << int(rng.integers(8))
            case 1:
                changed[start : start + size] = rng.bytes(min(size, len(changed) - start))
            case 2:
                changed[start : start + size] = bytes([int(rng.choice([0, 255]))]) * min(size, len(changed) - start)
            case 3:
                del changed[start:]
            case 4:
                del changed[start : start + size]
            case 5:
                changed[start:start] = changed[start - size : start]
    return bytes(changed)


SEEDS = {
    "JPEG": JPEG,
    "progressive JPEG": AS_PILLOW["progressive.jpg"],
    "JPEG with EXIF": AS_PILLOW["rotated by EXIF.jpg"],
    "CMYK": AS_PILLOW["CMYK.jpg"],
    "PNG": PNG,
    "PNG with a palette, valid checksums": AS_PILLOW["palette with a transparent colour.png"],
    "PNG of 16 bits, valid checksums": AS_PILLOW["16 bit RGBA.png"],
    "WebP": saved(RGB, "WEBP"),
    "WebP, lossless, animated": AS_PILLOW["animated.webp"],
    "BMP": saved(RGB, "BMP"),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_damaged_files_are_decoded_or_refused(kind: str) -> None:
    rng = np.random.default_rng(0)
    decoded = refused = 0
    for _ in range(500):
        data = damage(SEEDS[kind], rng)
        if "valid checksums" in kind:
            data = with_checksums(
                data[:16] + SEEDS[kind][16:24] + data[24:]
            )  # decoding a hundred empty megapixels takes seconds
        try:
            image = decode(data)
        except ValueError:
            refused += 1
        else:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert image.size > 0
            decoded += 1
    assert refused > 50
    assert decoded > 5 or kind == "PNG"  # its checksums reveal nearly every change
