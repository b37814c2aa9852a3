"""Predicted memory against what the allocator measures in real runs, with every engine on 1, 2 and 4 ranks."""

import functools
import gc
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from models.negatives.bank import Bank
from tests.ranks import run_ranks
from tests.trainer.engines import make_config, make_rank_info
from trainer.config import Config
from trainer.plan.cases import ENGINES
from trainer.plan.dry_run import STEPS, RankMemory, dry_run
from trainer.train_step import Rates, TrainStep

# Parameters and activations take about as much memory, so an error in either would show.
VIT = {"backbone_args": {"depth": 4, "embed_dim": 128, "num_heads": 4, "patch_size": 4, "img_size": 32}, "dim": 32}
RESNET = {"backbone_args": {"channels": [16, 32, 64, 64], "layers": [1, 1, 1, 1]}, "dim": 32}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {"model": VIT, "optim": {"name": "adamw", "lr": 1e-3, "decay_norm_and_bias": False}},
    "resnet": {"model": RESNET, "optim": {"name": "lars", "accumulate": 2}, "data": {"views": [{"size": 128}] * 2}},
}
NETWORKS = {1: ["vit"], 2: ["vit", "resnet"], 4: ["vit"]}
BUCKET = {"zero_optimization": {"reduce_bucket_size": 200_000}}  # the default would outweigh such small networks


def cases(world_size: int) -> dict[tuple[str, str], Config]:
    """Return configurations with four images per rank by network and engine."""
    configs = {}
    for network in NETWORKS[world_size]:
        for name, engine in ENGINES.items():
            on_top = {"options": BUCKET} if engine["kind"] == "deepspeed" else {}
            recipe = RECIPES[network]
            data = {"batch_size": 4 * world_size, "views": [{"size": 32}] * 2, **recipe.get("data", {})}
            sections: dict[str, dict[str, Any]] = {
                "method": {"bn": "local"},
                "bank": {"size": 4096},
                "engine": {**engine, **on_top},
            }
            configs[network, name] = make_config(network, **{**recipe, **sections, "data": data})
    return configs


def let_gloo_run_first() -> None:
    """Prefer the other threads of this process, gloo's: they hold what they send until they get a core."""
    try:
        for thread in os.listdir("/proc/self/task"):
            if int(thread) != threading.get_native_id():
                os.setpriority(os.PRIO_PROCESS, int(thread), -10)
    except PermissionError:  # without root; then other processes come first, too
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def allocated(config: Config) -> int:
    """Return the peak of the bytes that torch's allocator counts on this rank."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rank_info = make_rank_info()
        train_step = TrainStep(config, rank_info)
        bank = train_step.method.negatives
        assert isinstance(bank, Bank)
        bank.fill(torch.randn_like(bank.w_KD))
        let_gloo_run_first()  # its threads exist by now
        for step in range(STEPS):
            each, sizes = config.data.batch_size // rank_info.world_size, [view.size for view in config.data.views]
            views = [torch.randint(256, (each, size, size, 3), dtype=torch.uint8) for size in sizes]
            train_step.step(views, step, Rates(1e-3, 3.0, 0.99))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def all_allocated(world_size: int) -> list[int]:
    measured = []
    for config in cases(world_size).values():
        with ThreadPoolExecutor(1) as thread:  # a thread cannot leave SCHED_IDLE again
            measured.append(thread.submit(allocated, config).result())
    return measured


def all_counted(world_size: int) -> list[RankMemory]:
    return [run.memory for run in dry_run(list(cases(world_size).values()), world_size, world_size)]


@functools.cache
def measured(world_size: int, attempt: int) -> dict[tuple[str, str], int]:
    return dict(zip(cases(world_size), run_ranks(world_size, all_allocated, world_size)[0], strict=True))


@functools.cache
def predicted(world_size: int) -> dict[tuple[str, str], RankMemory]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return dict(zip(cases(world_size), pool.submit(all_counted, world_size).result(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "network", "engine"), [(world_size, *case) for world_size in NETWORKS for case in cases(world_size)]
)
def test_memory_within_a_tenth(world_size: int, network: str, engine: str) -> None:
    memory = predicted(world_size)[network, engine]
    # The least of up to six runs: on a busy machine gloo's threads may hold what they sent for longer.
    least = measured(world_size, 0)[network, engine]
    for attempt in range(1, 6):
        if memory.peak != pytest.approx(least, rel=0.1):
            least = min(least, measured(world_size, attempt)[network, engine])
    assert memory.peak == pytest.approx(least, rel=0.1)
    if network == "vit":  # both shares matter
        assert memory.activations > 0.2 * memory.peak
        assert memory.networks + memory.optimizer + memory.gradients > 0.2 * memory.peak


@pytest.mark.parametrize(
    ("gib", "gpu"), [(30, "40 GB"), (34, "80 GB"), (69, "80 GB"), (71, "141 GB"), (124, "141 GB"), (125, "")]
)
def test_fits(gib: int, gpu: str) -> None:
    """A tenth and 2 GiB must remain."""
    assert RankMemory(gib * 2**30, 0, 0, 0, 0, "backward").fits_on == gpu
