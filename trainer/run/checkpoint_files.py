"""Files of a checkpoint: DCP's shards and index, weights.safetensors, and a manifest with checksums."""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor

from trainer.run.files import write_safetensors

WEIGHTS = "weights.safetensors"

State = dict[str, Any]  # nested dictionaries of tensors
Manifest = dict[str, dict[str, Any]]  # size and SHA-256 of each file, by name


def step_of(path: Path) -> int:
    """Return the step of the checkpoint directory `path`."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoint directories, newest first; [] if `folder` does not exist.

    Directories that a user has renamed are not included. Raises OSError if the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in names if re.fullmatch(r"step-\d+", name)), key=step_of, reverse=True)


def make_temporary(path: Path) -> None:
    """Create the directory that a checkpoint is written to, and delete those of processes killed while saving."""
    for unfinished in path.parent.glob(".step-*"):
        shutil.rmtree(unfinished)
    path.mkdir(parents=True)


def write_weights(folder: Path, state: State) -> None:
    """Write student and teacher to weights.safetensors, for other programs. Called by one rank.

    Sharded tensors are read from the shards that DCP has just written to `folder`, so no rank has to communicate.
    """
    networks = {name: state.get(name, {}) for name in ("student", "teacher")}
    weights = {f"{network}.{name}": x for network, tensors in networks.items() for name, x in tensors.items()}
    unsharded = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in weights.items() if isinstance(x, DTensor)}
    if unsharded:
        _load_state_dict(unsharded, storage_reader=Reader(folder), no_dist=True)
    if weights:
        on_host = {name: x.detach().cpu().contiguous() for name, x in (weights | unsharded).items()}
        write_safetensors(folder / WEIGHTS, on_host)
        with (folder / WEIGHTS).open("rb") as file:
            os.fsync(file.fileno())


def checksums(folder: Path, rank: int) -> Manifest:
    """Return the manifest entries of the files in `folder` that this rank has written."""
    mine = [*folder.glob(f"__{rank}_*")]
    if rank == 0:
        mine += [path for path in (folder / ".metadata", folder / WEIGHTS) if path.exists()]
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(mine)}


def publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, then give the directory its final name."""
    with (temporary / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # damaged, or the run was resumed from an earlier step
        final.rename(replaced)  # deleting takes long, and the process may be killed meanwhile
    temporary.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def find_damage(path: Path, rank: int, world_size: int) -> str | None:
    """Check every `world_size`-th file of a checkpoint against the manifest; returns what is wrong, or None.

    Raises OSError, with the name of the file, if a file cannot be read; this does not mean that it is damaged.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        for name, expected in sorted(manifest.items())[rank::world_size]:
            file = path / name
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{file.name} is missing"
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer(dcp.FileSystemWriter):
    """Writes shards to files and syncs them to the disk. Raises the operating system's error if that fails."""

    def __init__(self, path: Path) -> None:
        # Without a limit of 0, DCP would copy tensors ahead on a CUDA stream, which opens a context on GPU 0.
        super().__init__(path, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """See `FileSystemWriter`. torch.save's zip writer replaces an OSError by a RuntimeError of its own."""
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class Reader(dcp.FileSystemReader):
    """Reads shards, and the index without executing code that a forged one may contain.

    Attributes:
        error: Why the index could not be read, on the rank that reads it; torch 2.11 does not pass this on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.error: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `FileSystemReader`."""
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata: Metadata = IndexUnpickler(file).load()
        except Exception as error:
            self.error = error
            raise
        return metadata


class IndexUnpickler(pickle.Unpickler):
    """Unpickles DCP's index. Raises UnpicklingError for any class or function that is not part of one."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a dtype or a class of the list below."""
        if f"{module}.{name}" == "builtins.getattr":  # Python 3.11.0 to 3.11.3 pickle members of an enum with it
            return _memory_format
        if module == "pathlib._local":  # Python 3.13 pickles paths with this name
            module = "pathlib"
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or f"{module}.{name}" in _INDEX_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in the index of a checkpoint")


def _memory_format(owner: Any, name: str) -> Any:
    if owner is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"an attribute of {owner!r} is not allowed in the index of a checkpoint")
    return _MEM_FORMAT_ENCODING[name]


_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    f"{_METADATA}._MEM_FORMAT_ENCODING",
    f"{_METADATA}.ChunkStorageMetadata",
    f"{_METADATA}.Metadata",
    f"{_METADATA}.MetadataIndex",
    f"{_METADATA}.StorageMeta",
    f"{_METADATA}.TensorProperties",
    f"{_METADATA}.TensorStorageMetadata",
}
