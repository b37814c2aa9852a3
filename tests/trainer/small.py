"""A run that takes seconds: coloured squares, a small network."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from trainer.config import Config

PYTHON = sys.executable


def write_images(folder: Path, classes: int = 3, each: int = 24, side: int = 20) -> Path:
    """folder/class-c/i.png: noise in a colour of the class."""
    noise = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class-{c}").mkdir(parents=True)
        for i in range(each):
            image = noise.integers(0, 90, (side, side, 3), np.uint8)
            image[:, :, c % 3] += 120
            assert cv2.imwrite(str(folder / f"class-{c}" / f"{i:03d}.png"), image)
    return folder


RESNET = {"backbone": "resnet18", "backbone_args": {"channels": [8, 8, 8, 16]}, "dim": 16}
VIT_ARGS: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 16}
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT_ARGS, "dim": 16}


def small_config(folder: Path, images: Path, **sections: dict[str, Any]) -> Config:
    """18 steps over 72 images in batches of 12 at 16 pixels, a checkpoint every 4; `sections` change it."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder), "epochs": 3, "device": "cpu", "log_every": 1, "save_every": 4, "keep": 10},
        "data": {
            "train": str(images),
            "val": str(images),
            "batch_size": 12,
            "workers": 0,
            "views": [{"size": 16}, {"size": 16}],
        },
        "model": RESNET,
        "method": {"teacher_momentum": 0.9},
        "bank": {"size": 30},
        "optim": {"lr": 0.5},
        "eval": {"knn_every": 1, "k": 5},
    }
    for name, changes in sections.items():
        another = name == "method" and "name" in changes
        values[name] = {**({} if another else values.get(name, {})), **changes}
    return Config.model_validate(values)
