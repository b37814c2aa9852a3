"""Decodes images to pixels."""

import zlib

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

# Pillow's limit for a decompression bomb: a file of a few kilobytes can claim 65,535 x 65,535 pixels (13 GB).
MAX_PIXELS = 178_956_970

# Damaged files are reported with their names; OpenCV's own line on stderr has no name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of an encoded image, uint8 [H, W, 3] RGB, upright (EXIF orientation applied), without alpha.

    The result equals Pillow's `exif_transpose` and `convert("RGB")`, except that 16-bit grey keeps its high byte and
    Pillow clips it.

    Raises:
        ValueError: The image is damaged, has an unknown format, or more than MAX_PIXELS pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    _check_size(data)
    # simplejpeg is a fifth faster than OpenCV, but ignores the EXIF orientation.
    if data.startswith(b"\xff\xd8") and data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # it also refuses files that Pillow and OpenCV accept, such as stray bytes between two markers
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:  # such as more pixels than OpenCV allows
        raise ValueError(error.err) from error
    if image is None:
        raise ValueError("damaged, cut short, or not an image that OpenCV can read")
    return image


def _check_size(data: bytes) -> None:
    """Raise ValueError if a JPEG, PNG or BMP claims too many pixels, or a PNG chunk more bytes than the file has.

    WebP images have at most 16,383 x 16,383 pixels, and OpenCV refuses 2^30 pixels in any format.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return  # the decoder will report it
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        # OpenCV would allocate the gigabytes that a header or a chunk claims, and only then find the damage.
        position = 8
        while position + 8 <= len(data) and data[position + 4 : position + 8] != b"IEND":
            position += 12 + int.from_bytes(data[position : position + 4], "big")
        if position > len(data) or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
            raise ValueError("damaged, cut short, or not a PNG")
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith(b"BM"):
        width, height = (abs(int.from_bytes(data[k : k + 4], "little", signed=True)) for k in (18, 22))
    else:
        return
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
