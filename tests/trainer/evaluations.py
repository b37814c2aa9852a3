"""A run to evaluate that was never trained: a small network's first weights, and pictures that its features tell."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.trainer.small import small_config
from trainer.build import make_encoder
from trainer.config import dump
from trainer.distributed import Place
from trainer.evaluate.verb import Results, Verb, evaluate
from trainer.run_dir import read_config
from trainer.weights import NEWEST

NARROW: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_args": {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]},
    "dim": 16,
}


def write_run(folder: Path, images: Path, **sections: dict[str, Any]) -> Path:
    """As another program may leave one: config.yaml and weights.safetensors, without checkpoints."""
    folder.mkdir(parents=True)
    config = small_config(folder, images, **{"model": NARROW, **sections})
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    weights = make_encoder(config).state_dict()
    save_file({f"student.{name}": x for name, x in weights.items()}, folder / "weights.safetensors")
    return folder


def evaluate_here(verb: Verb, run: Path, overrides: list[str], name: str | None = None) -> Results:
    """In the group that this process is in."""
    world = dist.get_world_size()
    place = Place(torch.device("cpu"), dist.get_rank(), world, world)
    return evaluate(verb, run, read_config(run, overrides), name, NEWEST, place, time.time())
