"""Predicted collectives against those of real gloo processes: each call, its type and its bytes are equal."""

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer.engines import NARROW, build_train_step, make_config, make_rank_info
from trainer.config import Config
from trainer.plan.cases import ENGINES, case_config
from trainer.plan.collectives import Collective
from trainer.plan.dry_run import STEPS, dry_run
from trainer.plan.trace import CollectiveEvent, Event, StepTrace
from trainer.train_step import Rates

Found = list[tuple[str, Collective, int, bool]]

# By number of ranks; two ranks form a node.
PLACEMENTS = {1: ("sharded",), 2: ("sharded",), 4: ("replicated", "sharded", "node")}
OTHERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "compressed": ("ddp", 2, {"engine": {"kind": "ddp", "compress": "bf16"}}),
    "bf16": ("fsdp", 2, {"engine": {"kind": "fsdp"}, "run": {"precision": "bf16"}}),
    "hybrid sharding": ("fsdp", 4, {"engine": {"kind": "fsdp", "placement": "node"}}),
    "kept after forward": ("fsdp", 2, {"engine": {"kind": "fsdp", "reshard_after_forward": False}}),
    "lars in two micro-batches": (
        "fsdp",
        2,
        {"engine": {"kind": "fsdp"}, "optim": {"name": "lars", "lr": 0.1, "accumulate": 2}},
    ),
    "synchronised": ("ddp", 2, {"method": {"bn": "sync"}}),
    "symmetric": ("ddp", 2, {"method": {"bn": "shuffle", "symmetric": True}}),
    "moco": ("zero2", 2, {"method": {"name": "moco"}, "bank": {"size": 64}}),
    "simclr": ("ddp", 2, {"method": {"name": "simclr"}}),
}


def cases(world_size: int) -> dict[str, Config]:
    """Return all engines and placements, and the other settings that change the traffic."""
    configs: dict[str, tuple[str, str, dict[str, Any]]] = {
        f"{e}, {p}": (e, p, {}) for e, p in product(ENGINES, PLACEMENTS[world_size])
    }
    configs |= {
        name: (engine, "sharded", sections) for name, (engine, ranks, sections) in OTHERS.items() if ranks == world_size
    }
    found = {}
    for name, (engine, placement, changes) in configs.items():
        sections = {"method": {"bn": "shuffle"}, "data": {"batch_size": 16, "views": [{"size": 16}] * 2}, **changes}
        config = make_config("resnet", model={**NARROW, "small_images": True, "stem_stride": 2}, **sections)
        found[name] = case_config(config, engine, placement, 16, "a100")
    return found


def per_node(world_size: int) -> int:
    return min(world_size, 2)


def calls(events: list[Event]) -> Found:
    return [(x.phase, x.collective, x.nodes, x.engine) for x in events if isinstance(x, CollectiveEvent)]


def all_real(world_size: int) -> list[Found]:
    """Return the collectives of this rank's last step in each case, from real training."""
    found = []
    for config in cases(world_size).values():
        train_step = build_train_step(config, make_rank_info(per_node(world_size)))
        trace = StepTrace(per_node(world_size))
        for step in range(STEPS):
            each, sizes = config.data.batch_size // world_size, [view.size for view in config.data.views]
            views = [torch.randint(256, (each, size, size, 3), dtype=torch.uint8) for size in sizes]
            with trace if step == STEPS - 1 else nullcontext():
                train_step.step(views, step, Rates(1e-3, 3.0, 0.99))
        found.append(calls(trace.events))
    return found


def all_predicted(world_size: int) -> list[Found]:
    return [calls(run.events) for run in dry_run(list(cases(world_size).values()), world_size, per_node(world_size))]


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run in a new process: DeepSpeed keeps its groups for the life of a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


@functools.cache
def real(world_size: int) -> dict[str, Found]:
    return dict(zip(cases(world_size), run_ranks(world_size, all_real, world_size)[0], strict=True))


@functools.cache
def predicted(world_size: int) -> dict[str, Found]:
    return dict(zip(cases(world_size), in_process(all_predicted, world_size), strict=True))


@pytest.mark.parametrize(
    ("world_size", "case"),
    [pytest.param(world_size, case, marks=pytest.mark.slow) for world_size in (1, 2, 4) for case in cases(world_size)],
)
def test_collectives_are_predicted(world_size: int, case: str) -> None:
    found, counted = predicted(world_size)[case], real(world_size)[case]
    assert found == counted
    if world_size > 1:
        assert sum(call.sent for _, call, _, _ in found) > 10_000


@pytest.mark.slow
def test_nodes_and_issuers() -> None:
    """On four ranks of two nodes: which collectives cross nodes, and which an engine issues."""
    found = predicted(4)["fsdp, node"]
    assert {(call.ranks, nodes) for phase, call, nodes, _ in found if phase == "score"} == {
        (2, 1),  # queries within a node
        (2, 2),  # keys between
    }
    assert {phase for phase, _, _, engine in found if engine} == {"teacher", "student", "backward", "optimizer"}
    assert {phase for phase, _, _, engine in found if not engine} == {"teacher", "score", "adversary"}
    hybrid = [call for call in predicted(4)["hybrid sharding"] if call[0] == "backward"]
    kinds = {(call.operator, call.ranks, nodes) for _, call, nodes, _ in hybrid}
    assert kinds == {("all_gather", 2, 1), ("reduce_scatter", 2, 1), ("all_reduce", 2, 2)}
    assert all(engine for _, _, _, engine in hybrid)
