"""A run to evaluate: a small untrained network, whose features separate the classes of the tests' images."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.trainer.small import small_config
from trainer.build import build_encoder
from trainer.config_file import dump
from trainer.distributed import RankInfo
from trainer.evaluate.base import Evaluator, Results
from trainer.evaluate.run import evaluate
from trainer.interop.weights import NEWEST
from trainer.run.directory import read_config

NARROW: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_args": {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]},
    "dim": 16,
}


def write_run(folder: Path, images: Path, **sections: dict[str, Any]) -> Path:
    """Write a run as an import does: config.yaml and weights.safetensors, without checkpoints."""
    folder.mkdir(parents=True)
    config = small_config(folder, images, **{"model": NARROW, **sections})
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    weights = build_encoder(config).state_dict()
    save_file({f"student.{name}": x for name, x in weights.items()}, folder / "weights.safetensors")
    return folder


def evaluate_here(evaluator: Evaluator, run: Path, overrides: list[str], name: str | None = None) -> Results:
    """Evaluate a run in the process group of this process. An override replaces an earlier one of the same key."""
    overrides = list({text.partition("=")[0]: text for text in overrides}.values())
    world_size = dist.get_world_size()
    rank_info = RankInfo(torch.device("cpu"), dist.get_rank(), world_size, world_size)
    return evaluate(evaluator, run, read_config(run, overrides), name, NEWEST, rank_info, time.time())
