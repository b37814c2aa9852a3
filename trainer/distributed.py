"""The group of ranks: one process or many under torchrun, always with a process group, so that all code is the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class RankInfo(NamedTuple):
    """This process among all: its device, its number, how many there are, and how many on this machine."""

    device: torch.device
    rank: int
    world_size: int
    local_world_size: int


@contextmanager
def process_group(device: str) -> Iterator[RankInfo]:
    """In the group that torchrun's environment describes, or in a group of one. `device`: auto, cpu or cuda.

    Raises ValueError where a GPU is asked for and there is none for this rank, or the driver does not fit.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "auto":
        if torch.cuda.device_count() > 0 and not torch.cuda.is_available():
            raise ValueError(
                f"run.device: this machine has GPUs, but its driver is too old for torch {torch.__version__}; "
                "run.device=cpu trains without them"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"run.device: cuda, but this machine has {torch.cuda.device_count()} GPUs for {local_world_size} ranks"
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # batches keep their shapes: a search once, then the fastest convolutions
        rank_info = RankInfo(torch.device("cuda", local_rank), rank, world_size, local_world_size)
    else:
        rank_info = RankInfo(torch.device("cpu"), rank, world_size, local_world_size)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    options: dict[str, Any] = {} if world_size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Short enough that a lost rank ends the job the same hour, long enough for an index of millions of files.
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **options)
    try:
        yield rank_info
    except BaseException:
        # NCCL's end waits for the other ranks, who wait in a collective for this one: it has to say why, and go.
        if rank_info.device.type == "cpu" or world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def raise_on_all_ranks(error: str | None) -> None:
    """Raise ValueError on all ranks if any has an error: the first one's, with its rank."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(text if len(errors) == 1 else f"rank {rank}: {text}")
