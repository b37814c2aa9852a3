"""Photographs for tests: many crops of the two in scikit-learn, and an optional folder of others."""

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

FOLDER = Path(os.environ.get("PHOTOS", ".data/photos"))  # class/image.jpg


def jpeg(picture: NDArray[np.uint8], mode: str = "RGB", orientation: int = 1, quality: int = 90) -> bytes:
    """Return `picture` as a JPEG file, with an EXIF orientation if it is not 1."""
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, "JPEG", quality=quality, exif=exif)
    return file.getvalue()


def cuts(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Return `count` crops of two photographs, reduced and mirrored, uint8 [H, W, 3] with sides from 60 to 640."""
    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    pictures = []
    for i in range(count):
        image = photographs[i % 2]
        width, height = rng.integers(200, 640), rng.integers(150, 427)
        x, y = rng.integers(0, 640 - width + 1), rng.integers(0, 427 - height + 1)
        image = image.crop((int(x), int(y), int(x + width), int(y + height)))
        if rng.random() < 0.5:
            image = image.reduce(2) if rng.random() < 0.5 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pictures.append(np.array(image))
    return pictures


def write_photos(root: Path, count: int = 40) -> Path:
    """Write `count` JPEG files of several qualities into one folder; some are grey or have an EXIF orientation."""
    (root / "c").mkdir(parents=True)
    for i, picture in enumerate(cuts(count)):
        mode = "L" if i % 10 == 3 else "RGB"
        data = jpeg(picture, mode, orientation=i % 8 + 1 if i % 4 == 1 else 1, quality=70 + i % 4 * 8)
        (root / "c" / f"{i:03d}.jpg").write_bytes(data)
    return root
