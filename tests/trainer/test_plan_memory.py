"""Predicted memory against what the allocator hands out in real runs, under every engine on 1, 2 and 4 ranks."""

import functools
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.ranks import run_ranks
from tests.trainer.engines import make_config, make_place
from trainer.build import autocast_type, make_engine, make_game
from trainer.config import Config
from trainer.plan import ENGINES, Memory, count_memory
from trainer.step import Learner, Rates

STATE_MIB = 3.0  # of the ViT's parameters; its activations are of the same order
VIT = {"backbone_args": {"depth": 4, "embed_dim": 128, "num_heads": 4, "patch_size": 4, "img_size": 32}, "dim": 32}
RESNET = {"backbone_args": {"channels": [32, 32, 64, 128], "layers": [1, 1, 1, 1]}, "dim": 32}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {"model": VIT, "optim": {"name": "adamw", "lr": 1e-3, "decay_norm_and_bias": False}},
    "resnet": {"model": RESNET, "optim": {"name": "lars", "accumulate": 2}},
}
BUCKET = {"zero_optimization": {"reduce_bucket_size": 200_000}}  # ours would outweigh such networks


def cases(world: int) -> list[Config]:
    """Four images a rank under each engine."""
    configs = []
    for name, recipe in RECIPES.items():
        for engine in ENGINES.values():
            on_top = {"options": BUCKET} if engine["kind"] == "deepspeed" else {}
            data = {"batch_size": 4 * world, "views": [{"size": 32}] * 2}
            sections = {"data": data, "method": {"bn": "local"}, "bank": {"size": 4096}, "engine": {**engine, **on_top}}
            configs.append(make_config(name, **sections, **recipe))
    return configs


def allocated(config: Config) -> int:
    """The most bytes that torch's allocator had handed out at once on this rank, of its own account."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        place = make_place()
        game = make_game(config, place)
        game.bank.fill(torch.randn_like(game.bank.w_KD))
        engine = make_engine(game, config, place)
        learner = Learner(game, engine, place, config.optim.accumulate, autocast_type(config, place.device))
        for step in range(2):
            each, sizes = config.data.batch_size // place.world, [view.size for view in config.data.views]
            views = [torch.randn(each, 3, size, size).to(memory_format=torch.channels_last) for size in sizes]
            learner.step(views, step, Rates(1e-3, 3.0, 0.99))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def all_allocated(world: int) -> list[int]:
    return [allocated(config) for config in cases(world)]


@functools.cache
def measured(world: int) -> list[int]:
    return run_ranks(world, all_allocated, world)[0]
