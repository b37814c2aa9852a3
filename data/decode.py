"""Decodes images to pixels.

The common files take the fast decoders: plain JPEGs simplejpeg, plain PNGs and WebPs OpenCV. Everything else, and what
simplejpeg refuses, is decoded by Pillow, whose result is the definition. The size of an image is always known before
memory is allocated for it.
"""

import io
import warnings
import zlib
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

# Pillow's limit for a decompression bomb: a file of a few bytes can claim 65,535 x 65,535 pixels (13 GB).
MAX_PIXELS = 178_956_970

# Pillow would also open EPS with Ghostscript, and rare formats whose decoders are hardly tested.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers of a frame header
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # PNG chunks; some hold the EXIF or XMP data of ImageMagick and Photoshop

# Pillow warns of images above half of MAX_PIXELS and of damaged EXIF data.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Damaged files are reported with their names; OpenCV's own line on stderr has no name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of an encoded image, uint8 [H, W, 3] RGB, upright (EXIF orientation applied), without alpha.

    The result equals Pillow's `exif_transpose` and `convert("RGB")` of the first frame, except that 16-bit grey keeps
    its high byte and Pillow clips it.

    Raises:
        ValueError: The image is damaged, has an unknown format, or more than MAX_PIXELS pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(_JPEG):
        return _decode_jpeg(data)
    plain = False
    if data.startswith(_PNG):
        plain = _check_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        plain = _check_webp(data)
    return _decode_with_opencv(data) if plain else _decode_with_pillow(data)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    frame = jpeg_frame(data)
    _check_size(frame.width, frame.height)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # it refuses CMYK, and files that Pillow accepts, such as stray bytes between two markers
        return _decode_with_pillow(data)
    return turn(pixels, read_orientation(data)) if orientation_segments(data) else pixels


def _decode_with_opencv(data: bytes) -> NDArray[np.uint8]:
    with suppress(cv2.error):
        if (image := cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)) is not None:
            return image
    return _decode_with_pillow(data)  # it accepts a PNG without an end, for example, and says what is damaged


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height)
            image.load()  # turns a TIFF, and then deletes its orientation
            orientation = _orientation(image)
            if image.mode.startswith("I;16"):
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                pixels = np.repeat(grey[..., None], 3, axis=2)
            else:
                pixels = np.asarray(image.convert("RGB"))
    except Image.UnidentifiedImageError:
        raise ValueError("not an image, or of a format that is not supported") from None
    except Exception as error:  # damaged files make Pillow's parsers raise nearly every type
        raise ValueError(f"damaged or cut short: {error}") from error
    return turn(pixels, orientation)


def turn(image: NDArray[np.uint8], orientation: int | None) -> NDArray[np.uint8]:
    """Return an image [H, W, 3] upright; `orientation` is the EXIF tag, 1 to 8, or None if there is no valid one."""
    if orientation in (3, 4, 6, 7):
        image = image[::-1]
    if orientation in (2, 3, 7, 8):
        image = image[:, ::-1]
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image)


def read_orientation(data: bytes) -> int | None:
    """Return the orientation of an image as Pillow reads it from EXIF or XMP data, 1 to 8; None if it is damaged."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _orientation(image)
    except (OSError, ValueError, SyntaxError):
        return None


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data make Pillow raise nearly every type, and the pixels may be good
        return None
    return value if value in range(1, 9) else None


class JpegFrame(NamedTuple):
    """The frame header of a JPEG: its marker (0xC0 baseline, 0xC1 extended, 0xC2 progressive), bits, and size."""

    marker: int
    precision: int
    height: int
    width: int


def jpeg_frame(data: bytes) -> JpegFrame:
    """Return the frame header of a JPEG. Raises ValueError if it has none."""
    for marker, start, _ in _jpeg_segments(data):
        if marker in _FRAMES and len(data) >= start + 5:
            height, width = (int.from_bytes(data[k : k + 2], "big") for k in (start + 1, start + 3))
            return JpegFrame(marker, data[start], height, width)
    raise ValueError("damaged or cut short: it has no frame header")


def orientation_segments(data: bytes) -> list[bytes]:
    """Return the segments of a JPEG that may have its orientation: EXIF data, and XMP data with that tag."""
    found = (data[start:end] for marker, start, end in _jpeg_segments(data) if marker == 0xE1)
    return [segment for segment in found if segment.startswith(b"Exif\0\0") or b"tiff:Orientation" in segment]


def _jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """Return marker, start and end of the contents of each segment before the compressed pixels."""
    segments, place = [], 2
    while (place := data.find(b"\xff", place)) >= 0:
        while data[place + 1 : place + 2] == b"\xff":  # padding
            place += 1
        if place + 4 > len(data) or data[place + 1] in (0xD9, 0xDA):  # the end, or the pixels
            break
        marker, place = data[place + 1], place + 2
        if (0 < marker < 0xD0 and marker != 0x01) or marker > 0xD9:  # others have no contents
            end = place + int.from_bytes(data[place : place + 2], "big")
            segments.append((marker, place + 2, end))
            place = max(end, place + 2)
    return segments


def _check_png(data: bytes) -> bool:
    """Return whether a PNG has one frame and no orientation.

    Raises:
        ValueError: It claims too many pixels, or a chunk more bytes than the file has. OpenCV would allocate the
            gigabytes that a chunk claims and only then find the damage.
    """
    place, plain = 8, True
    while place + 8 <= len(data) and (kind := data[place + 4 : place + 8]) != b"IEND":
        size = int.from_bytes(data[place : place + 4], "big")
        name = data[place + 8 : place + 8 + min(size, 24)]
        plain &= kind not in (b"acTL", b"eXIf")
        plain &= kind not in _TEXTS or not name.startswith((b"Raw profile type", b"XML:com.adobe.xmp"))
        place += 12 + size
    header = data[12:29]
    if place > len(data) or header[:4] != b"IHDR" or zlib.crc32(header) != int.from_bytes(data[29:33], "big"):
        raise ValueError("damaged, cut short, or not a PNG")
    _check_size(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    return plain


def _check_webp(data: bytes) -> bool:
    """Return whether a WebP has one frame and no orientation. Raises ValueError if it claims too many pixels."""
    plain, kind = True, data[12:16]
    if kind == b"VP8X":  # flags, then the size of the canvas
        plain = not int.from_bytes(data[20:21], "little") & 0b1110  # EXIF, XMP, animation
        width, height = (int.from_bytes(data[k : k + 3], "little") + 1 for k in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(data[k : k + 2], "little") & 0x3FFF for k in (26, 28))
    _check_size(width, height)
    return plain


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
