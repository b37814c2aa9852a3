"""Reads checkpoint files of other programs. No code that a file might contain is run.

A checkpoint is a file of torch.save, a safetensors file, or a folder in the format of timm or transformers as Hugging
Face stores it, whose weights may be in several files with an index.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.interop.weights import read_safetensors

# Entries of a checkpoint that hold tensors by name, as dotted paths, and the prefix that the names get here.
CONTAINERS = {
    "state_dict": "",
    "model_state_dict": "",
    "model": "",
    "net": "",
    "module": "",
    "classy_state_dict.base_model.model": "",
    "state_dict_ema": "ema.",
    "model_ema": "ema.",
    "ema_state_dict": "ema.",
    "model_ema_state_dict": "ema.",
    "ema": "ema.",
    "student": "student.",
    "teacher": "teacher.",
    "encoder": "encoder.",
    "target_encoder": "target_encoder.",
    "online_network_state_dict": "online_network.",
    "target_network_state_dict": "target_network.",
}

# Modules that wrap another one: DistributedDataParallel, torch.compile, FSDP, activation checkpointing, Fabric.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


class ForeignCheckpoint(NamedTuple):
    """The content of a file.

    `settings` has the plain values that describe the model, by dotted names such as `arch` and `args.patch_size`.
    `ignored` lists the other entries of the file, such as the optimizer's.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any] = {}  # noqa: RUF012
    ignored: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> ForeignCheckpoint:
    """Reads a file of torch.save or safetensors, or a folder.

    Raises:
        ValueError: The file is of another kind or damaged, or it contains more than tensors and plain data.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(".index.json"):
        return ForeignCheckpoint(_named_tensors(path, _read_parts(path)))
    if path.suffix == ".safetensors":
        tensors = _named_tensors(path, read_safetensors(path))
        with safe_open(path, "pt") as file:
            return ForeignCheckpoint(tensors, flatten_settings(file.metadata() or {}))
    loaded = _unpickle(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, need tensors by name (a state_dict)")
    containers = {name: entries for name in CONTAINERS if _has_tensors(entries := _get(loaded, name))}
    nested = [str(name) for name, entries in loaded.items() if _has_tensors(entries) and "optim" not in str(name)]
    if not containers and not _has_tensors(loaded) and len(nested) == 1:
        containers = {nested[0]: loaded[nested[0]]}
    tensors = {
        CONTAINERS.get(container, "") + name: x
        for container, entries in containers.items()
        for name, x in _named_tensors(path, entries).items()
    }
    used = {name.partition(".")[0] for name in containers}
    left = [name for name, x in loaded.items() if name not in used and (tensors or not isinstance(x, Tensor))]
    left += [f"{name}.{key}" for name, own in containers.items() for key in own if not isinstance(own[key], Tensor)]
    described = {name: x for name, x in loaded.items() if name not in used}
    return ForeignCheckpoint(
        tensors or _named_tensors(path, loaded), flatten_settings(described), tuple(map(str, left))
    )


def _read_folder(path: Path) -> ForeignCheckpoint:
    settings: dict[str, Any] = {}
    try:
        for name in ("preprocessor_config.json", "config.json"):
            if name == "config.json" or (path / name).exists():
                settings |= json.loads((path / name).read_text(encoding="utf-8-sig"))
        if not {"architecture", "model_type"} & settings.keys():
            raise ValueError("no architecture")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a timm model of Hugging Face or a model of transformers: it has no config.json with an "
            "architecture or a model_type"
        ) from error
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        if (path / name).exists():
            break
    # The arguments for timm stay as they are: they may have null or mappings as values.
    flat = flatten_settings(settings) | {"model_args": settings.get("model_args") or {}}
    return ForeignCheckpoint(read_checkpoint(path / name).tensors, flat)


def weight_files(path: Path) -> list[Path]:
    """Returns the files that hold the weights of a checkpoint."""
    if path.name.endswith(".index.json"):
        parts = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return [path.parent / name for name in sorted(set(parts))]
    if path.is_dir():
        names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        return next((weight_files(path / name) for name in names if (path / name).exists()), [])
    return [path]


def _read_parts(index: Path) -> dict[str, Tensor]:
    try:
        files = weight_files(index)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of weight files: it has no weight_map") from error
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{index}: the files {', '.join(missing)} do not exist beside it: copy all of them")
    return {name: x for file in files for name, x in read_checkpoint(file).tensors.items()}


def _get(loaded: dict[Any, Any], path: str) -> Any:
    """Returns the entry at a dotted path, or None. Nested dictionaries of tensors become one."""
    entry: Any = loaded
    for name in path.split("."):
        entry = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(entry, dict):
        return None
    nested = [name for name, x in entry.items() if isinstance(x, dict) and _has_tensors(x)]
    return {name: x for name, x in entry.items() if name not in nested} | {
        f"{name}.{key}": x for name in nested for key, x in entry[name].items()
    }


def _has_tensors(entries: Any) -> bool:
    return isinstance(entries, dict) and any(isinstance(x, Tensor) for x in entries.values())


def _named_tensors(path: Path, entries: dict[Any, Any]) -> dict[str, Tensor]:
    """Returns the tensors without the names of wrappers, wherever these are in a name."""
    tensors = {str(name): x for name, x in entries.items() if isinstance(x, Tensor)}
    if entries and not tensors:
        others = ", ".join(map(str, entries))
        raise ValueError(f"{path} has entries that are not tensors, and no state_dict or model with tensors: {others}")
    if not tensors:
        raise ValueError(f"{path} has no tensors")
    short: dict[str, str] = {}
    for name in tensors:
        other = short.setdefault(".".join(part for part in name.split(".") if part not in _WRAPPERS), name)
        if other != name:
            raise ValueError(f"{path} has both {other} and {name}, which are the same tensor of a wrapped module")
    return {name: tensors[long] for name, long in short.items()}


def flatten_settings(values: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the strings, numbers and lists of numbers in nested dictionaries and Namespaces by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in (vars(values) if isinstance(values, argparse.Namespace) else values).items():
        name = f"{prefix}{key}"
        if name.startswith(("optimizer", "lr_scheduler", "loops", "callbacks", "scaler")):
            continue
        if isinstance(value, (dict, argparse.Namespace)):
            flat |= flatten_settings(value, f"{name}.")
        elif isinstance(value, str | int | float | list | tuple):
            flat[name] = value
    return flat


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


def _join(*parts: str) -> str:
    """Replaces pathlib's paths while reading."""
    return "/".join(parts)


# Official checkpoints contain these besides the types that torch allows: arguments, numpy scalars, paths, and the
# dictionaries in which Lightning stores hyper-parameters.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_join, "pathlib.PosixPath"),
    (_join, "pathlib._local.PosixPath"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (OrderedDict, "lightning.pytorch.utilities.parsing.AttributeDict"),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
]


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} asks for {match[1]}, which is not data and might run code: refused. If you trust its source, "
                'keep its tensors only, where the program that wrote it is installed: python -c "import torch; '
                f"torch.save({{'state_dict': torch.load('{path}', 'cpu', weights_only=False)['state_dict']}}, "
                "'tensors.pth')\", and import tensors.pth"
            ) from error
        raise ValueError(f"{path} is not a checkpoint of torch.save, or damaged") from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # torch raises any of these for a file that is truncated or of another kind.
        raise ValueError(f"{path} is not a checkpoint of torch.save, or cut short: {error}") from error
