"""Runs a function on several ranks: processes of one gloo group on this machine."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def run_ranks(world_size: int, function: Callable[..., T], *args: Any) -> list[T]:
    """What `function(*args)`, a function of a module, returns on each rank of a group of `world` processes.

    Raises the first failing rank's exception.
    """
    # A fork server imports torch once; forked from pytest itself the ranks would inherit locks of its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world_size, context) as pool:
        store = Path(folder) / "store"
        # Each task waits for all others to join the group, so no process takes two of them.
        ranks = [pool.submit(_rank, rank, world_size, store, function, args) for rank in range(world_size)]
        return [rank.result() for rank in ranks]


def _rank(rank: int, world_size: int, store: Path, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=world_size, timeout=timedelta(seconds=180)
    )
    try:
        result = function(*args)
        dist.barrier()  # one that leaves early would cut the connection to others that are only just joining
        return result
    finally:
        dist.destroy_process_group()
