"""Small files that claim enormous images, and files with many images: decoding takes no more memory than the limit."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from PIL import Image

SMALL = Image.new("RGB", (8, 8), (9, 99, 200))
SIDE = 32_767
MUCH = zlib.compress(bytes(200_000_000), 1)


def saved(kind: str, picture: Image.Image = SMALL, **options: object) -> bytearray:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return bytearray(file.getvalue())


def patched(data: bytearray, place: int, values: bytes) -> bytes:
    data[place : place + len(values)] = values
    return bytes(data)


def tiff(compression: str) -> bytes:
    data = saved("TIFF", compression=compression)
    for tag in (256, 257):  # width and height
        place = min(p for kind in (3, 4) if (p := data.find(struct.pack("<HH", tag, kind))) > 0)
        data = bytearray(patched(data, place + 2, struct.pack("<HII", 4, 1, SIDE)))
    return bytes(data)


def png(kind: bytes, contents: bytes) -> bytes:
    """Return a PNG with another chunk, which inflates to 200 MB."""
    data = saved("PNG")
    contents += MUCH
    chunk = struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))
    return bytes(data[:33] + chunk + data[33:])


def claims() -> dict[str, bytes]:
    """Return files of less than a kilobyte that claim more pixels than the limit."""
    little, big = struct.pack("<HH", SIDE, SIDE), struct.pack(">II", SIDE, SIDE)
    gif, jp2 = saved("GIF", SMALL.quantize(2)), saved("JPEG2000")
    j2k = saved("JPEG2000", no_jp2=True)
    moving = saved("WEBP", save_all=True, append_images=[SMALL.rotate(90), Image.new("RGB", (8, 8))])
    assert moving[12:16] == b"VP8X"
    jpeg = saved("JPEG")
    return {
        "GIF, screen": patched(gif[:], 6, little),
        "GIF, frame": patched(gif[:], gif.index(b"\x2c\0\0\0\0") + 5, little),
        "TIFF": tiff("raw"),
        "TIFF, LZW": tiff("tiff_lzw"),
        "JPEG 2000": patched(jp2, jp2.index(b"ihdr") + 4, big),
        "JPEG 2000, codestream": patched(j2k, j2k.index(b"\xff\x51") + 6, big),
        "PPM": f"P6 {SIDE} {SIDE} 255\n".encode() + bytes(100),
        "PGM, ASCII": f"P2 {SIDE} {SIDE} 255\n1 2 3".encode(),
        "WebP": patched(saved("WEBP"), 26, struct.pack("<HH", 16_383, 16_383)),
        "WebP, lossless": patched(saved("WEBP", lossless=True), 21, struct.pack("<I", 0x0FFFFFFF)),
        "WebP, animated": patched(moving, 24, b"\xfe\xff\0" * 2),
        "BMP": patched(saved("BMP"), 18, struct.pack("<ii", SIDE, -SIDE)),
        "BMP of OS/2": b"BM"
        + struct.pack("<IHHI", 226, 0, 0, 26)
        + struct.pack("<IHHHH", 12, SIDE, SIDE, 1, 24)
        + bytes(200),
        "JPEG with padding": patched(jpeg[:], jpeg.index(b"\xff\xc0") + 5, b"\xff\xfe" * 2).replace(
            b"\xff\xc0", b"\xff\xff\xc0", 1
        ),
        "PFM": f"PF\n{SIDE} {SIDE}\n-1.0\n".encode() + bytes(100),
        "Radiance": f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {SIDE} +X {SIDE}\n".encode() + bytes(100),
    }


def contents() -> dict[str, bytes]:
    """Return images of 8 x 8 pixels with text or profiles that inflate to 200 MB."""
    return {
        "zTXt": png(b"zTXt", b"k\0\0"),
        "iTXt": png(b"iTXt", b"k\0\1\0\0\0"),
        "iCCP": png(b"iCCP", b"k\0\0"),
        "XMP": png(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
        "EXIF": png(b"zTXt", b"Raw profile type exif\0\0"),
    }


def movies() -> dict[str, bytes]:
    """Return files of 30 images of 1000 x 1000 pixels: 3 MB each, 90 MB together."""
    first, *others = (Image.new("RGB", (1000, 1000), (i, 2, 3)) for i in range(30))
    every = {"save_all": True, "append_images": others}
    return {
        "GIF": bytes(saved("GIF", first, **every)),
        "TIFF": bytes(saved("TIFF", first, compression="tiff_lzw", **every)),
        "APNG": bytes(saved("PNG", first, **every)),
        "WebP": bytes(saved("WEBP", first, lossless=True, method=0, quality=0, **every)),
    }


PROGRAM = """
import pickle, resource, sys
from data.decode import decode

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

files, megabytes = pickle.load(open(sys.argv[1], "rb"))
for data in files.values():
    try:
        decode(data[:len(data) // 2])  # imports Pillow's decoders
    except ValueError:
        pass
limit = address_space() + megabytes * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = {}
for name, data in files.items():
    try:
        found[name] = decode(data).shape
    except ValueError as error:
        found[name] = str(error)
pickle.dump(found, open(sys.argv[2], "wb"))
"""


def decode_within(files: dict[str, bytes], megabytes: int, tmp_path: Path) -> dict[str, tuple[int, ...] | str]:
    """Decode files in a process that may take `megabytes` of memory; return shapes and errors."""
    (tmp_path / "in.pickle").write_bytes(pickle.dumps((files, megabytes)))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in.pickle"), str(tmp_path / "out.pickle")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((tmp_path / "out.pickle").read_bytes())


def test_claims_are_refused_without_memory(tmp_path: Path) -> None:
    files = claims()
    assert all(len(data) < 1000 for data in files.values())
    found = decode_within(files, 50, tmp_path)
    assert found.keys() == files.keys()
    for name, error in found.items():
        assert isinstance(error, str), name
        expected = "not supported" if name in ("PFM", "Radiance") else "pixels"
        assert expected in error, (name, error)


def test_text_and_profiles_are_not_inflated(tmp_path: Path) -> None:
    found = decode_within(contents(), 50, tmp_path)
    assert {name for name, shape in found.items() if shape == (8, 8, 3)} == {"zTXt", "iTXt", "iCCP"}
    assert "too large" in str(found["XMP"])
    assert "too large" in str(found["EXIF"])


def test_only_the_first_image_is_decoded(tmp_path: Path) -> None:
    found = decode_within(movies(), 60, tmp_path)
    assert set(found.values()) == {(1000, 1000, 3)}
