"""Checkpoints: torch.distributed.checkpoint in a folder per step, whole or absent, checked before use.

    checkpoints/step-00001000/      what dcp writes, each rank its own files
        weights.safetensors         student and teacher whole, for other programs
        manifest.json               size and SHA-256 of each file

A checkpoint is written under another name and renamed when it is complete; older ones go only after that. Only
tensors are stored: what else dcp can hold would be unpickled on loading.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

State = dict[str, Any]  # nested, tensors at the leaves

WEIGHTS = "weights.safetensors"


class Saver:
    """Saves checkpoints beside training, one at a time; made and called by all ranks.

    The state is copied to host memory, and a thread with a process group of its own writes the copy. keep: how many
    of the newest stay. stays: whether that of a step stays for good besides.
    """

    def __init__(self, folder: Path, keep: int, stays: Callable[[int], bool] = lambda step: False) -> None:
        self.folder, self.keep, self.stays = folder, keep, stays
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        self.thread = ThreadPoolExecutor(1, "checkpoint", _give_way)
        self.pace = _Pace()
        self.pending: Future[bool] | None = None

    def start(self, step: int, state: State) -> None:
        """Take a copy of `state` and begin to write the checkpoint of `step`; first wait for the one before."""
        self.wait()
        weights = _whole_weights(state)
        copy = BlockingAsyncStager().stage(state)
        self.pace = _Pace()
        self.pending = self.thread.submit(
            _save, self.folder, step, copy, weights, self.keep, self.group, self.stays, self.pace
        )

    def done(self) -> bool:
        """Whether this rank has written what was begun."""
        return self.pending is None or self.pending.done()

    def wait(self) -> bool:
        """Until what was begun is written. False, on all ranks, if it could not be: see `save`."""
        self.pace.hurry.set()
        pending, self.pending = self.pending, None
        return pending is None or pending.result()


def save(folder: Path, step: int, state: State, keep: int) -> bool:
    """Write `state` as the checkpoint of `step` and delete all but the newest `keep`; called by all ranks.

    False, on all ranks, where the disk does not take it: says so in the log, and earlier checkpoints stay.
    """
    return _save(folder, step, state, _whole_weights(state), keep, dist.group.WORLD)


def _save(
    folder: Path,
    step: int,
    state: State,
    weights: State,
    keep: int,
    group: dist.ProcessGroup | None,
    stays: Callable[[int], bool] = lambda step: False,
    pace: "_Pace | None" = None,
) -> bool:
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    failure = None
    files: dict[str, Any] = {}
    rank = dist.get_rank()
    if rank == 0:
        failure = _attempt(lambda: _make_empty(temporary))
    failure = _any_failure(failure, group)
    if failure is None:
        try:
            dcp.save(state, storage_writer=_Writer(temporary, pace), process_group=group)
            if weights:
                _write_weights(temporary / WEIGHTS, weights)
            mine = [*temporary.glob(f"__{rank}_*")] + ([temporary / ".metadata"] if rank == 0 else [])
            files = _checksums([*mine, temporary / WEIGHTS] if weights else mine, pace)
        except (dcp.CheckpointException, OSError) as error:
            failure = _reason(error)
        failure = _any_failure(failure, group)
    if failure is None:
        every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, files, group=group)
        if rank == 0:
            manifest = {name: entry for files in every for name, entry in sorted(files.items())}
            failure = _attempt(lambda: _publish(temporary, final, manifest))
    failure = _any_failure(failure, group)
    if failure is not None:
        if rank == 0:
            need = sum(x.numel() * x.element_size() for x in tree_leaves(state) if isinstance(x, torch.Tensor))
            shutil.rmtree(temporary, ignore_errors=True)
            log.warning(
                "checkpoint of step %d not saved in %s: %s; it takes about %.3g MB; training goes on, "
                "earlier checkpoints stay",
                step,
                folder,
                failure,
                need / 1e6,
            )
        return False
    if rank == 0:
        # Later ones than this were found damaged, or the run would have gone on from them: they count for nothing.
        for old in [path for path in _list(folder) if step_of(path) <= step][keep:]:
            if not stays(step_of(old)):
                shutil.rmtree(old, ignore_errors=True)
    return True


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says, the same on all ranks; None if there is none.

    Damaged ones are named in the log and left where they are. Ranks share the reading.
    """
    for path in _agreed_list(folder):
        damage = _agreed_damage(path)
        if damage is None:
            return path
        if dist.get_rank() == 0:
            log.warning("checkpoint %s is damaged (%s): skipped", path, damage)
    return None


def find(folder: Path, step: int) -> Path:
    """The checkpoint of a step, its files as its manifest says. Called by all ranks, who share the reading.

    Raises ValueError, on all of them, where it is not there or damaged.
    """
    found = {step_of(path): path for path in _agreed_list(folder)}
    if step not in found:
        raise ValueError(f"{folder} has no checkpoint of step {step}, only of {', '.join(map(str, sorted(found)))}")
    if damage := _agreed_damage(found[step]):
        raise ValueError(f"checkpoint {found[step]} is damaged ({damage})")
    return found[step]


def step_of(path: Path) -> int:
    """The step whose checkpoint is at `path`."""
    return int(path.name.removeprefix("step-"))


def load(path: Path, state: State) -> None:
    """Fill the tensors of `state`, which may be a part of what was saved, in place. Called by all ranks.

    Raises ValueError, on all ranks, where the checkpoint does not have them, or its index holds what is not data.
    """
    try:
        dcp.load(state, storage_reader=_Reader(path))
    except dcp.CheckpointException as error:
        raise ValueError(f"checkpoint {path}: {_reason(error)}") from error


class _Pace:
    """Half of the time of writing is rest, unless somebody waits: a network on few cores would feel it."""

    def __init__(self) -> None:
        self.hurry = threading.Event()
        self.since = time.monotonic()

    def rest(self) -> None:
        """As long as it took since the last rest."""
        self.hurry.wait(time.monotonic() - self.since)
        self.since = time.monotonic()


class _PacedFile(io.FileIO):
    def __init__(self, path: Path, pace: _Pace) -> None:
        super().__init__(path, "w")
        self.pace = pace

    def write(self, data: Any) -> Any:
        written = super().write(data)
        self.pace.rest()
        return written


class _PacedFiles(FileSystem):
    def __init__(self, pace: _Pace) -> None:
        self.pace = pace

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with io.BufferedWriter(_PacedFile(path, self.pace), 1 << 20) as stream:
            yield stream


class _Writer(dcp.FileSystemWriter):
    """Fails with the operating system's words: torch.save's zip writer covers them with its own."""

    def __init__(self, path: Path, pace: _Pace | None) -> None:
        # fsync, so that the rename cannot come before the content. Nothing is copied ahead: all is in host memory, and
        # the default would open a context on GPU 0 in every rank.
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)
        if pace:
            self.fs = _PacedFiles(pace)

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _Reader(dcp.FileSystemReader):
    """Reads the index of a checkpoint without running what a forged one might contain."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == "builtins.getattr":  # how Python 3.11.0 to 3.11.3 write the member of an enumeration
            return _memory_format
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or f"{module}.{name}" in _INDEX_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


def _memory_format(owner: Any, name: str) -> Any:
    if owner is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"an attribute of {owner!r} has no place in a checkpoint's index")
    return _MEM_FORMAT_ENCODING[name]


_INDEX_CLASSES = {
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}


def _give_way() -> None:
    """Take the cores that training leaves: where its networks run on all of them, they come first at any time."""
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))  # of this thread only


def _list(folder: Path) -> list[Path]:
    """All checkpoints, newest first; folders that a user has named otherwise are left alone."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def _agreed_list(folder: Path) -> list[Path]:
    """As rank 0 sees it."""
    found: list[Path] = []
    if dist.get_rank() == 0:
        found = _list(folder)
    listed: list[list[Path]] = [found]
    dist.broadcast_object_list(listed)
    return listed[0]


def _make_empty(path: Path) -> None:
    for left in path.parent.glob(".step-*"):  # of a process that was killed while saving
        shutil.rmtree(left)
    path.mkdir(parents=True)


def _whole_weights(state: State) -> State:
    """The networks of a state by network.name, whole and in host memory; on rank 0, nothing on others."""
    weights = {}
    for network in ("student", "teacher"):
        for name, x in state.get(network, {}).items():
            x = x.full_tensor() if isinstance(x, DTensor) else x  # a collective
            if dist.get_rank() == 0:
                weights[f"{network}.{name}"] = x.detach().to("cpu", copy=True).contiguous()
    return weights


def _write_weights(path: Path, weights: State) -> None:
    save_file(weights, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    with (temporary / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # a damaged one of the same step, or the same run trained again from an earlier one
        shutil.rmtree(final)
    temporary.rename(final)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _damage(path: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with one of every `world` files of a checkpoint, None if nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in sorted(manifest.items())[rank::world_size]:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} does not have its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _agreed_damage(path: Path) -> str | None:
    return _any_failure(_damage(path, dist.get_rank(), dist.get_world_size()), dist.group.WORLD)


def _checksums(paths: list[Path], pace: _Pace | None) -> dict[str, Any]:
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path, pace)} for path in paths}


def _sha256(path: Path, pace: _Pace | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(1 << 22):
            digest.update(part)
            if pace:
                pace.rest()
    return digest.hexdigest()


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _any_failure(failure: str | None, group: dist.ProcessGroup | None) -> str | None:
    """The first failure of any rank, on all ranks."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=group)
    return next((f for f in failures if f is not None), None)


def _reason(error: BaseException) -> str:
    """The operating system's words inside dcp's exception, which spans many lines."""
    failures = getattr(error, "failures", {})
    for wrapped in failures.values():
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return str(inner)
    return str(error).splitlines()[0]
