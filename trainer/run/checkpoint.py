"""Checkpoints: one directory per step, written atomically with torch.distributed.checkpoint (DCP) and verified on use.

    checkpoints/step-00001000/
        __0_0.distcp, .metadata     DCP's shards, written by each rank, and their index
        weights.safetensors         unsharded weights of student and teacher, for other programs
        manifest.json               size and SHA-256 of each file

A checkpoint is written to a temporary directory and renamed once it is complete. Only then are older ones deleted.
Checkpoints contain tensors only, because DCP would pickle any other object.
"""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.utils._pytree import tree_leaves

from trainer.run.checkpoint_files import (
    WEIGHTS,
    Reader,
    State,
    Writer,
    checksums,
    find_damage,
    list_checkpoints,
    make_temporary,
    publish,
    step_of,
    write_weights,
)

__all__ = ["WEIGHTS", "Saver", "State", "find", "load", "newest", "save", "step_of"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Saver:
    """Saves checkpoints in a background thread, one at a time. Methods except `done` are called by all ranks.

    Training waits only while the state is copied to host memory. The thread uses a process group of its own.

    Args:
        folder: The directory of the checkpoints.
        keep: Number of newest checkpoints that are kept.
        keep_forever: Returns whether the checkpoint of a step is never deleted.
    """

    def __init__(self, folder: Path, keep: int, keep_forever: Callable[[int], bool] = lambda step: False) -> None:
        self.folder, self.keep, self.keep_forever = folder, keep, keep_forever
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[bool] | None = None

    def start(self, step: int, state: State) -> None:
        """Wait for the previous checkpoint, copy `state`, and start writing the checkpoint of `step`."""
        self.wait()
        staged = BlockingAsyncStager().stage(state)
        self.pending = self.thread.submit(_save, self.folder, step, staged, self.keep, self.keep_forever, self.group)

    def done(self) -> bool:
        """Return whether this rank has finished writing."""
        return self.pending is None or self.pending.done()

    def wait(self) -> bool:
        """Wait until the checkpoint is written. Returns False, on all ranks, if that failed; see `save`."""
        pending, self.pending = self.pending, None
        return pending is None or pending.result()


def save(folder: Path, step: int, state: State, keep: int) -> bool:
    """Write `state` as the checkpoint of `step` and delete all but the newest `keep`. Called by all ranks.

    Returns False, on all ranks, if the file system refuses: this is logged and earlier checkpoints are kept.
    """
    return _save(folder, step, state, keep, lambda step: False, dist.group.WORLD)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match their checksums, or None.

    Called by all ranks, which share the reading. Damaged checkpoints are logged and kept.
    """
    for path in _list_on_rank_0(folder):
        damage = _find_damage(path)
        if damage is None:
            return path
        if dist.get_rank() == 0:
            log.warning("checkpoint %s is damaged (%s): skipped", path, damage)
    return None


def find(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step after verifying its checksums.

    Called by all ranks, which share the reading. Raises ValueError, on all ranks, if it does not exist or is damaged.
    """
    found = {step_of(path): path for path in _list_on_rank_0(folder)}
    if step not in found:
        raise ValueError(f"{folder} has no checkpoint of step {step}, only of {', '.join(map(str, sorted(found)))}")
    if damage := _find_damage(found[step]):
        raise ValueError(f"checkpoint {found[step]} is damaged ({damage})")
    return found[step]


def load(path: Path, state: State) -> None:
    """Load a checkpoint into the tensors of `state`, in place. Called by all ranks.

    Args:
        path: The checkpoint.
        state: May contain only some of the tensors of the checkpoint, sharded in any way.

    Raises:
        ValueError: On all ranks, if a tensor is missing, has another shape, or the index contains code.
    """
    try:
        dcp.load(state, storage_reader=Reader(path))
    except dcp.CheckpointException as error:
        raise ValueError(f"checkpoint {path}: {_reason(error)}") from error


class _SaveError(Exception):
    """A rank could not write its part of a checkpoint."""


def _save(
    folder: Path,
    step: int,
    state: State,
    keep: int,
    keep_forever: Callable[[int], bool],
    group: dist.ProcessGroup | None,
) -> bool:
    """See `save`."""
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    rank = dist.get_rank()

    def write() -> dict[str, dict[str, object]]:
        dcp.save(state, storage_writer=Writer(temporary), process_group=group)
        if rank == 0:  # every rank has written its shards by now
            write_weights(temporary, state)
        return checksums(temporary, rank)

    try:
        _on_all_ranks(lambda: make_temporary(temporary) if rank == 0 else None, group)
        manifest = {name: entry for files in _on_all_ranks(write, group) for name, entry in files.items()}
        _on_all_ranks(lambda: publish(temporary, final, manifest) if rank == 0 else None, group)
    except _SaveError as error:
        if rank == 0:
            size = sum(x.numel() * x.element_size() for x in tree_leaves(state) if isinstance(x, torch.Tensor))
            shutil.rmtree(temporary, ignore_errors=True)
            log.warning(
                "checkpoint of step %d not saved in %s: %s; it takes about %.3g MB; training continues and "
                "earlier checkpoints are kept",
                step, folder, error, size / 1e6,
            )  # fmt: skip
        return False
    if rank == 0:
        # Checkpoints of later steps do not count: they are damaged, or the run would have been resumed from them.
        for old in [path for path in list_checkpoints(folder) if step_of(path) <= step][keep:]:
            if not keep_forever(step_of(old)):
                shutil.rmtree(old, ignore_errors=True)
    return True


def _on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Run an action on every rank and return all results. Raises _SaveError, on all ranks, if it fails on one."""
    result, error = None, None
    try:
        result = action()
    except (dcp.CheckpointException, OSError) as cause:
        error = _reason(cause)
    outcomes: list[tuple[T | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, error), group=group)
    for _, error in outcomes:
        if error is not None:
            raise _SaveError(error)
    return [result for result, _ in outcomes]  # type: ignore[misc]


def _list_on_rank_0(folder: Path) -> list[Path]:
    """Return rank 0's list of checkpoints on all ranks, newest first."""
    listed = [list_checkpoints(folder) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(listed)
    return listed[0]


def _find_damage(path: Path) -> str | None:
    """Verify a checkpoint and return what is wrong with it, on all ranks, or None."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(path, dist.get_rank(), dist.get_world_size()))
    return next((damage for damage in found if damage is not None), None)


def _reason(error: BaseException) -> str:
    """Return the operating system's message from inside a DCP exception, whose own text spans many lines."""
    for failure in getattr(error, "failures", {}).values():
        return str(failure[0] if isinstance(failure, tuple) else failure)
    return str(error).splitlines()[0]
