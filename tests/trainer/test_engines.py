"""Every engine on 1, 2 and 4 ranks does what one process does without any, and goes on from what another has saved.

Importing DeepSpeed takes seconds, so each group of processes runs many cases.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.trainer.engines import Outcome, make_config, make_learner, make_place, outcome, run, train
from tests.trainer.small import small_config
from trainer import checkpoint
from trainer.build import make_encoder, whole_student
from trainer.config import Config
from trainer.distributed import Place
from trainer.engine import LossScale, blocks, whole
from trainer.zero import make_json

Sections = dict[str, dict[str, Any]]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
}
# What each network trains with. Clipping and accumulation are in both; LARS's lr is per 256 images, too.
RECIPES: dict[str, Sections] = {
    "resnet": {"optim": {"name": "lars", "lr": 5.0, "weight_decay": 1e-3, "decay_norm_and_bias": False, "clip": 1.0}},
    "vit": {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "decay_norm_and_bias": False, "accumulate": 2}},
}
# On top of that what must not change the result, by number of ranks.
ON_TOP: dict[int, dict[str, dict[str, Any]]] = {
    1: {},
    2: dict.fromkeys(ENGINES, {"activation_checkpointing": True}),
    4: {"fsdp": {"placement": "node", "reshard_after_forward": False}},
}


def run_all(world: int) -> dict[tuple[str, str], Outcome]:
    """Of every engine and network."""
    outcomes = {}
    for engine, settings in ENGINES.items():
        for model, recipe in RECIPES.items():
            config = make_config(model, **recipe, engine={**settings, **ON_TOP[world].get(engine, {})})
            outcomes[engine, model] = run(config, ranks_per_node=2 if world == 4 else None)
    return outcomes if dist.get_rank() == 0 else {}


@functools.cache
def on_ranks(world: int) -> dict[tuple[str, str], Outcome]:
    return run_ranks(world, run_all, world)[0]


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference by name, relative to the tensor's largest element."""
    assert a.keys() == b.keys()
    return {k: float((a[k] - b[k]).abs().max().float() / (b[k].abs().max().float() + 1e-6)) for k in b}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", RECIPES)
def test_the_same_as_one_process_alone(model: str, engine: str, world: int) -> None:
    """Ten steps. LOSS: BatchNorm, LARS and AdamW enlarge rounding errors; a wrong gradient is off by far more."""
    alone, found = on_ranks(1)["ddp", model], on_ranks(world)[engine, model]
    assert found.losses == pytest.approx(alone.losses, rel=1e-4)
    assert found.norms == pytest.approx(alone.norms, rel=1e-2)
    print(
        max(abs(a / b - 1) for a, b in zip(found.losses, alone.losses)),
        max(abs(a / b - 1) for a, b in zip(found.norms, alone.norms)),
    )
    for part in ("student", "teacher", "bank", "optimizer"):
        differences = differ(getattr(found, part), getattr(alone, part))
        print(part, max((v, k) for k, v in differences.items()))
