"""Encoded pictures to pixels."""

import zlib

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

# Pillow's limit for a decompression bomb: a file of a few kilobytes can claim to be 65,535 x 65,535 pixels (13 GB).
MAX_PIXELS = 178_956_970

# A damaged file is reported by us, with its name; OpenCV's own line on stderr has none.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(data: bytes) -> NDArray[np.uint8]:
    """An encoded picture as uint8 [H, W, 3] RGB, upright (EXIF orientation applied), alpha dropped.

    What Pillow's `exif_transpose` and `convert("RGB")` give, but 16-bit grey keeps its high byte, where Pillow clips.
    Raises ValueError with the reason if the picture is damaged, of an unknown kind or above MAX_PIXELS.
    """
    if not data:
        raise ValueError("the file is empty")
    _check_size(data)
    # simplejpeg is a fifth faster than OpenCV, but does not turn a picture that has an EXIF orientation.
    if data.startswith(b"\xff\xd8") and data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # it also refuses what Pillow and OpenCV take, such as stray bytes between two markers
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:  # such as more pixels than OpenCV allows
        raise ValueError(error.err) from error
    if image is None:
        raise ValueError("damaged, cut short, or not an image that OpenCV can read")
    return image


def _check_size(data: bytes) -> None:
    """Raise ValueError if a JPEG, PNG or BMP claims more pixels, or a PNG's chunk more bytes, than there may be.

    WebP pictures have at most 16,383 x 16,383; OpenCV refuses 2^30 pixels of any kind.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return  # the decoder will say
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        # OpenCV takes memory for what a header or a chunk claims, gigabytes, and only then finds that it is damaged.
        place = 8
        while place + 8 <= len(data) and data[place + 4 : place + 8] != b"IEND":
            place += 12 + int.from_bytes(data[place : place + 4], "big")
        if place > len(data) or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
            raise ValueError("damaged, cut short, or not a PNG")
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith(b"BM"):
        width, height = (abs(int.from_bytes(data[k : k + 4], "little", signed=True)) for k in (18, 22))
    else:
        return
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
