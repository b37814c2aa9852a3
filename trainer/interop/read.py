"""Reads checkpoint files of other programs. No code that a file might contain is run.

A file is one of torch.save or a safetensors file, or a folder in timm's format as Hugging Face stores it.
"""

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor

from trainer.interop.weights import read_safetensors

# Entries of a checkpoint that hold tensors by name, and the prefix that the names get here.
CONTAINERS = {
    "state_dict": "",
    "model_state_dict": "",
    "model": "",
    "student": "student.",
    "teacher": "teacher.",
    "online_network_state_dict": "online_network.",
    "target_network_state_dict": "target_network.",
}


class ForeignCheckpoint(NamedTuple):
    """The content of a file.

    `backbone` is timm's name of the backbone, '' if the file does not contain it. `ignored` lists the other entries of
    the file, such as the optimizer's.
    """

    tensors: dict[str, Tensor]
    backbone: str = ""
    backbone_args: dict[str, Any] = {}  # noqa: RUF012
    ignored: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> ForeignCheckpoint:
    """Reads a file of torch.save or safetensors, or a folder in timm's format.

    Raises:
        ValueError: The file is of another kind or damaged, or it contains more than tensors and plain data.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return ForeignCheckpoint(_named_tensors(path, read_safetensors(path)))
    loaded = _unpickle(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, need tensors by name (a state_dict)")
    containers = {name: loaded[name] for name in CONTAINERS if isinstance(loaded.get(name), dict)}
    tensors = {
        CONTAINERS[container] + name: x
        for container, entries in containers.items()
        for name, x in _named_tensors(path, entries).items()
    }
    ignored = tuple(str(name) for name in loaded if name not in containers) if tensors else ()
    return ForeignCheckpoint(tensors or _named_tensors(path, loaded), _backbone_name(loaded), {}, ignored)


def _read_folder(path: Path) -> ForeignCheckpoint:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name, arguments = str(config["architecture"]), dict(config.get("model_args", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a timm model of Hugging Face: it has no config.json with an architecture"
        ) from error
    arguments.pop("num_classes", None)
    return ForeignCheckpoint(_named_tensors(path, read_safetensors(path / "model.safetensors")), name, arguments)


def _named_tensors(path: Path, entries: dict[Any, Any]) -> dict[str, Tensor]:
    """Returns the tensors without the name prefixes of DistributedDataParallel and torch.compile."""
    if others := [str(name) for name, x in entries.items() if not isinstance(x, Tensor)]:
        raise ValueError(
            f"{path} has entries that are not tensors, and no {' or '.join(CONTAINERS)}: {', '.join(others)}"
        )
    if not entries:
        raise ValueError(f"{path} has no tensors")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in entries.items()}


def _backbone_name(loaded: dict[Any, Any]) -> str:
    """Returns timm's name for the `arch` that MoCo, AdCo, SimCLR and DINO store, or ''."""
    arguments = loaded.get("args")
    arch = loaded.get("arch", getattr(arguments, "arch", None))
    if not isinstance(arch, str):
        return ""
    if match := re.fullmatch(r"(?:vit|deit)_(tiny|small|base|large)", arch):
        arch = f"vit_{match[1]}_patch{getattr(arguments, 'patch_size', 16)}_224"
    return arch if timm.is_model(arch) else ""


class _NumpyDtype:
    """Replaces numpy.dtype while reading: optimizers store learning rates as numpy scalars."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiub]\d", code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")  # numpy would unpickle arrays of objects
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignores the byte order."""


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.code)[0].item()


# Official checkpoints contain these besides the types that torch allows: DINO's arguments, and numpy scalars.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} asks for {match[1]}, which is not data and might run code: refused") from error
        raise ValueError(f"{path} is not a checkpoint of torch.save, or damaged") from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # torch raises any of these for a file that is truncated or of another kind.
        raise ValueError(f"{path} is not a checkpoint of torch.save, or cut short: {error}") from error
