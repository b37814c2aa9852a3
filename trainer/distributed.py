"""The process group: one process, or many under torchrun. There is always a group, so all code paths are the same."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class RankInfo(NamedTuple):
    """This process among all processes.

    Attributes:
        device: The device that it computes on.
        rank: Its rank among all processes.
        world_size: Number of processes.
        local_world_size: Number of processes on this machine.
        local_rank: Its rank among the processes on this machine.
    """

    device: torch.device
    rank: int
    world_size: int
    local_world_size: int
    local_rank: int = 0


@contextmanager
def process_group(device: str) -> Iterator[RankInfo]:
    """Join the process group that torchrun's environment describes, or create a group of one process.

    Args:
        device: Auto (a GPU if there is one), cpu or cuda.

    Raises:
        ValueError: This rank has no GPU although one is needed, or the machine's driver is too old.
    """
    _stop_with_torchrun()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "auto":
        if torch.cuda.device_count() > 0 and not torch.cuda.is_available():
            raise ValueError(
                f"run.device: this machine has GPUs, but its driver is too old for torch {torch.__version__}; "
                "run.device=cpu trains without them"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own, backend = torch.device("cpu"), "gloo"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"run.device: cuda, but this machine has {torch.cuda.device_count()} GPUs for {local_world_size} ranks"
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # batches keep their shapes, so one search finds the fastest convolutions
        own, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {} if world_size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # The timeout ends a job that lost a rank within the hour and is long enough to index millions of files.
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **options)
    try:
        yield RankInfo(own, rank, world_size, local_world_size, local_rank)
    except BaseException:
        # With NCCL, destroying the group waits for the other ranks, which wait in a collective for this one. This rank
        # must report its error and exit instead.
        if own.type == "cpu" or world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _stop_with_torchrun() -> None:
    """Ask the kernel for a SIGTERM when torchrun ends: nobody else stops the ranks of a torchrun that was killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def raise_on_all_ranks(error: str | None) -> None:
    """Raise ValueError on all ranks if any rank has an error, with the text and number of the first such rank."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(text if len(errors) == 1 else f"rank {rank}: {text}")
