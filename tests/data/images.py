"""Images for tests of `data`."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


def photograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return a synthetic photograph, uint8 [height, width, 3], with blotches of all sizes in muted colours."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 120, np.float32)
    for cells, strength in ((2, 40), (5, 25), (16, 12), (50, 6)):
        luma, color = rng.normal(size=(cells, cells, 1)), rng.normal(size=(cells, cells, 3))
        noise = (strength * (luma + 0.5 * color)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture.clip(0, 255).astype(np.uint8)


def write_folder(root: Path, classes: int = 3, per_class: int = 8, size: int = 40) -> Path:
    """Write c0/0.png, c0/1.png, … of different sizes into `root` and return it."""
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(per_class):
            picture = photograph(size + i, size + 2 * c, seed=c * per_class + i)
            assert cv2.imwrite(str(root / f"c{c}" / f"{i}.png"), picture[:, :, ::-1])
    return root
