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
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils._pytree import tree_leaves, tree_map

from trainer.distributed import raise_on_all_ranks
from trainer.ops.ending import Stopped, exit_without_cleanup
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
from trainer.run.files import unreadable

__all__ = ["WEIGHTS", "Saver", "State", "find", "load", "newest", "save", "step_of"]

log = logging.getLogger(__name__)

_END_SECONDS = 60.0  # that an error waits for a checkpoint that is being written

T = TypeVar("T")


class Saver:
    """Saves checkpoints in a background thread, one at a time. Methods except `done` are called by all ranks.

    Training waits only while the state is copied to host memory. The thread uses a process group of its own. An error
    in the `with` block waits for the checkpoint that is being written, but not for ranks or a disk that do not answer:
    then the process must end (`trainer.ops.ending`), and the next start deletes the incomplete files.

    Args:
        folder: The directory of the checkpoints.
        keep: Number of newest checkpoints that are kept.
        keep_forever: Returns whether the checkpoint of a step is never deleted.
        start: Step of the checkpoint that training continues from. Later checkpoints of other processes were damaged
            at that time; they are never deleted, unless training reaches the same step again.

    Attributes:
        error: Why the newest finished save failed, on all ranks; None if it did not.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_forever: Callable[[int], bool] = lambda step: False,
        start: int = 0,
    ) -> None:
        self.folder, self.keep, self.keep_forever, self.start_step = folder, keep, keep_forever, start
        self.saved: set[int] = set()
        self.error: str | None = None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[str | None] | None = None

    def __enter__(self) -> "Saver":
        """Return this saver; its thread starts with the first checkpoint."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the checkpoint that is being written, and end the thread before its group is destroyed."""
        complete = not self.pending or not wait_for([self.pending], timeout=_END_SECONDS).not_done
        if not complete:
            log.warning("a checkpoint in %s is not complete after %g s: abandoned", self.folder, _END_SECONDS)
            exit_without_cleanup()
        self.thread.shutdown(wait=complete)

    def start(self, step: int, state: State) -> None:
        """Wait for the previous checkpoint, copy `state`, and start writing the checkpoint of `step`."""
        self.wait()
        staged = copy_to_host(state)
        self.pending = self.thread.submit(_save, self.folder, step, staged, self._delete_old, self.group)

    def done(self) -> bool:
        """Return whether this rank has finished writing."""
        return self.pending is None or self.pending.done()

    def wait(self) -> bool:
        """Wait until the checkpoint is written. Returns False, on all ranks, if that failed; see `save`."""
        if self.pending:
            self.error, self.pending = self.pending.result(), None
        return self.error is None

    def _delete_old(self, step: int) -> None:
        """Delete the checkpoints that this training has superseded by that of `step`, except the newest `keep`."""
        self.saved.add(step)
        own = [s for s in map(step_of, list_checkpoints(self.folder)) if s in self.saved or s <= self.start_step]
        _delete(self.folder, [s for s in own if s <= step][self.keep :], self.keep_forever)


def copy_to_host(state: State) -> State:
    """Copy each tensor or DTensor once; DCP's BlockingAsyncStager copies DTensors twice.

    From a GPU, a copy that does not block goes to pinned memory, which is several times as fast as pageable memory, and
    all copies are waited for together. torch keeps pinned memory that is freed, for the next checkpoint.
    """

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.detach().to("cpu", copy=True, non_blocking=True, memory_format=torch.contiguous_format)

    staged: State = tree_map(copy, state)
    if any(x.is_cuda for x in tree_leaves(state)):
        torch.cuda.current_stream().synchronize()
    return staged


def save(folder: Path, step: int, state: State, keep: int) -> bool:
    """Write `state` as the checkpoint of `step` and delete all but the newest `keep`. Called by all ranks.

    Returns False, on all ranks, if the file system refuses: this is logged and earlier checkpoints are kept.
    """

    def delete_old(step: int) -> None:
        # Checkpoints of later steps do not count: they are damaged, or the run would have been resumed from them.
        earlier = [s for s in map(step_of, list_checkpoints(folder)) if s <= step]
        _delete(folder, earlier[keep:], lambda step: False)

    return _save(folder, step, state, delete_old, dist.group.WORLD) is None


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match their checksums, or None if there are no checkpoints.

    Called by all ranks, which share the reading. Damaged checkpoints are logged and kept. One that another process
    deletes meanwhile, because it is training and has newer ones, is not damaged: the search starts again.

    Raises:
        ValueError: On all ranks, if a file cannot be read, or if there are checkpoints and all of them are damaged.
    """
    damaged = []
    for path in _list_on_rank_0(folder):
        damage = _find_damage(path)
        if damage is None:
            return path
        if path not in _list_on_rank_0(folder):
            return newest(folder)
        damaged.append(f"{path.name}: {damage}")
        if dist.get_rank() == 0:
            log.warning("checkpoint %s is damaged (%s): skipped", path, damage)
    if damaged:
        raise ValueError(
            f"{folder} has checkpoints, but all of them are damaged ({'; '.join(damaged)}). Restore one of them, or "
            f"delete {folder} to start over"
        )
    return None


def find(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step after verifying its checksums.

    Called by all ranks, which share the reading. Raises ValueError, on all ranks, if it does not exist, is
    damaged or cannot be read.
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
        Stopped: On all ranks, if a rank was asked to stop.
    """
    reader = Reader(path)
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, Stopped):  # a signal to this rank or another one, and no fault of the checkpoint
                raise failure from error
        raise ValueError(f"checkpoint {path}: {reader.error or _reason(error)}") from error


class _SaveError(Exception):
    """A rank could not write its part of a checkpoint."""


def _save(
    folder: Path,
    step: int,
    state: State,
    delete_old: Callable[[int], None],
    group: dist.ProcessGroup | None,
) -> str | None:
    """Write a checkpoint, then call `delete_old` with its step on rank 0. Returns the error, on all ranks, or None."""
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
        leaves = tree_leaves([state, state.get("student"), state.get("teacher")])  # weights.safetensors repeats them
        size = sum(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))
        problem = f"checkpoint of step {step} not saved in {folder}: {error}; it takes about {size / 1e6:.3g} MB"
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            log.warning("%s; earlier checkpoints are kept", problem)
        return problem
    if rank == 0:
        try:
            delete_old(step)
        except OSError as error:
            log.warning("old checkpoints in %s are not deleted: %s", folder, error)
    return None


def _delete(folder: Path, steps: list[int], keep_forever: Callable[[int], bool]) -> None:
    """Delete the checkpoints of `steps` that are not kept forever."""
    for step in steps:
        if not keep_forever(step):
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)


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
    """Return rank 0's list of checkpoints on all ranks, newest first. Raises ValueError, on all ranks."""
    listed: list[list[Path]] = [[]]
    error = None
    if dist.get_rank() == 0:
        try:
            listed = [list_checkpoints(folder)]
        except OSError as cause:
            error = unreadable(cause)
    raise_on_all_ranks(error)
    dist.broadcast_object_list(listed)
    return listed[0]


def _find_damage(path: Path) -> str | None:
    """Verify a checkpoint and return what is wrong with it, on all ranks, or None.

    Raises ValueError, on all ranks, if a file cannot be read.
    """
    damage = error = None
    try:
        damage = find_damage(path, dist.get_rank(), dist.get_world_size())
    except OSError as cause:
        error = f"{unreadable(cause)}. Nothing was changed; make the file readable and repeat the command"
    raise_on_all_ranks(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damage)
    return next((damage for damage in found if damage is not None), None)


def _reason(error: BaseException) -> str:
    """Return the operating system's message from inside a DCP exception, whose own text spans many lines."""
    for failure in getattr(error, "failures", {}).values():
        return str(failure[0] if isinstance(failure, tuple) else failure)
    return str(error).splitlines()[0]
