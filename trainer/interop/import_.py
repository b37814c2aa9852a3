"""Checkpoints of other programs as run directories: config.yaml, weights.safetensors and imported.json.

The layouts are in `trainer.interop.layouts`. A file is read without running anything that might be in it.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from trainer.build import build_encoder
from trainer.config import Config, dump, load
from trainer.interop.layouts import BESIDES, LAYOUTS, Layout, from_children, from_torchvision_vit, is_torchvision_vit
from trainer.interop.weights import differences, read_safetensors
from trainer.run.checkpoint import WEIGHTS
from trainer.run.directory import IMPORTED
from trainer.run.files import write_atomically, write_json

# Entries of a checkpoint that hold tensors by name, and what stands before these names from then on.
CONTAINERS = {
    "state_dict": "",
    "model_state_dict": "",
    "model": "",
    "student": "student.",
    "teacher": "teacher.",
    "online_network_state_dict": "online_network.",
    "target_network_state_dict": "target_network.",
}

HEAD = ("0.weight", "0.bias", "2.weight", "2.bias")  # of MoCo v2, AdCo and ours: Linear, ReLU, Linear


class Found(NamedTuple):
    """What a file has: tensors by name, and the backbone that it is said to be of ('' if it does not say).

    beside: names of the file's other entries, such as optimizer, which are not looked into.
    """

    tensors: dict[str, Tensor]
    backbone: str = ""
    backbone_args: dict[str, Any] = {}  # noqa: RUF012
    beside: tuple[str, ...] = ()


def import_weights(path: Path, out: Path, backbone: str | None, overrides: list[str]) -> str:
    """Make the run directory `out` of the checkpoint at `path`, a file or Hugging Face's folder; says what was taken.

    backbone: name in timm; None: as the file says. `overrides` are of the configuration; model.* must be as the
    network was. Raises ValueError if `out` exists, if the file is not a checkpoint or more than data, and where it does
    not have exactly the tensors of the backbone: all names that differ are in the message.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, nothing is overwritten")
    found = read_checkpoint(path)
    layout = layout_of(found.tensors)
    name = backbone or found.backbone
    if not name:
        raise ValueError(
            f"{path} ({layout.name}) does not say which network it is of: give --backbone, such as resnet50"
        )
    networks, head = split(found.tensors, layout)
    model: dict[str, Any] = {"backbone": name, "backbone_args": found.backbone_args if name == found.backbone else {}}
    if head:
        hidden, features = networks["student"]["head.0.weight"].shape
        model |= {"dim": len(networks["student"]["head.2.weight"]), "hidden": None if hidden == features else hidden}
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        values = {"run": {"dir": str(out), "epochs": 1}, "data": {"train": "not-given"}, "model": model}
        (partial / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        config = _with_heads(load(partial / "config.yaml", overrides), layout)
        weights, left_out = fit(path, layout, networks, head, config)
        write_atomically(partial / "config.yaml", dump(config))
        (partial / WEIGHTS).write_bytes(save(weights))
        names = [network for network in ("student", "teacher") if networks[network]]
        write_json(
            partial / IMPORTED,
            {
                "file": path.name,
                "sha256": _sha256(path),
                "layout": layout.name,
                "networks": names,
                "left_out": left_out,
            },
        )
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    what = f"{config.model.backbone}{' with its head' if head else ''} of {layout.name}: {' and '.join(names)}"
    told = [f"{what}, {len(weights)} tensors: {out}"]
    told += [f"left out: {', '.join(left_out)}"] if left_out else []
    told += [f"not looked at: {', '.join(found.beside)}"] if found.beside else []
    return "\n".join(told)


def _with_heads(config: Config, layout: Layout) -> Config:
    """MoCo v3's ViT-S has 12 heads (its vits.py), timm's 6, and no tensor shows it."""
    model = config.model
    if layout.name != "MoCo v3" or not model.backbone.startswith("vit_small") or "num_heads" in model.backbone_args:
        return config
    arguments = {**model.backbone_args, "num_heads": 12}
    return config.model_copy(update={"model": model.model_copy(update={"backbone_args": arguments})})


def read_checkpoint(path: Path) -> Found:
    """What is in a file of torch.save or safetensors, or in a folder of Hugging Face's in timm's format.

    Raises ValueError if it is not one of these, is cut short, or holds more than tensors and plain data.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return Found(_plain(path, read_safetensors(path)))
    loaded = _unpickle(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, need tensors by name (a state_dict)")
    containers = {name: loaded[name] for name in CONTAINERS if isinstance(loaded.get(name), dict)}
    tensors = {
        CONTAINERS[name] + inner: x for name, held in containers.items() for inner, x in _plain(path, held).items()
    }
    beside = tuple(str(name) for name in loaded if name not in containers) if tensors else ()
    return Found(tensors or _plain(path, loaded), _said_backbone(loaded), {}, beside)


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """The first of the layouts whose prefix some names have."""
    if is_torchvision_vit(set(tensors)):
        return LAYOUTS[-1]
    return next(layout for layout in LAYOUTS if any(name.startswith(layout.student) for name in tensors))


def split(tensors: dict[str, Tensor], layout: Layout) -> tuple[dict[str, dict[str, Tensor]], bool]:
    """The tensors of each network by our names where we know them, the others under ''; whether they have our head."""
    prefixes = {"student": layout.student, "teacher": layout.teacher}
    networks: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "": {}}
    for name, x in tensors.items():
        network = next((n for n, prefix in prefixes.items() if prefix is not None and name.startswith(prefix)), "")
        networks[network][name.removeprefix(prefixes.get(network) or "")] = x
    head = all(f"fc.{name}" in networks["student"] for name in HEAD)
    for network in ("student", "teacher"):
        own = networks[network]
        if is_torchvision_vit(set(own)):
            own = {from_torchvision_vit(name): x for name, x in own.items()}
        if "0.weight" in own and "conv1.weight" not in own:
            own = {from_children(name): x for name, x in own.items()}
        networks[network] = {
            f"head.{name.removeprefix('fc.')}" if head and name.startswith("fc.") else f"backbone.{name}": x
            for name, x in own.items()
        }
    return networks, head


def fit(
    path: Path, layout: Layout, networks: dict[str, dict[str, Tensor]], head: bool, config: Config
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by network.name as `trainer.interop.weights` reads them, and the names that an encoder lacks.

    Raises ValueError with all names that differ otherwise.
    """
    parts = ("backbone.", "head.") if head else ("backbone.",)
    wanted = {name: x for name, x in build_encoder(config).state_dict().items() if name.startswith(parts)}
    weights: dict[str, Tensor] = {}
    left_out = list(networks[""])
    wrong = [name for name in networks[""] if not BESIDES.search(name)]
    problems = {f"unknown: {', '.join(wrong)}": ["file"]} if wrong else {}  # and which networks have them
    for network in ("student", "teacher"):
        own = networks[network]
        if not own:
            continue
        prefix = (layout.student if network == "student" else layout.teacher) or ""
        beside = [name for name in own if name not in wanted and BESIDES.search(name.removeprefix("backbone."))]
        left_out += [prefix + name.removeprefix("backbone.") for name in beside]
        own = {name: x for name, x in own.items() if name not in beside}
        # Files from before PyTorch 0.4.1, and converted ones, do not count batches; nothing that we do reads it.
        own |= {name: x for name, x in wanted.items() if name.endswith("num_batches_tracked") and name not in own}
        if difference := differences(own, wanted):
            problems.setdefault(difference, []).append(network)
        elif bad := [name for name, x in own.items() if not x.isfinite().all()]:
            problems.setdefault(f"not finite: {', '.join(bad)}", []).append(network)
        else:
            weights |= {f"{network}.{name}": own[name].to(x.dtype).contiguous() for name, x in wanted.items()}
    if problems:
        text = "; ".join(f"{' and '.join(where)}: {what}" for what, where in problems.items()).replace("backbone.", "")
        raise ValueError(f"{path} ({layout.name}) is not of {config.model.backbone} as configured: {text}")
    return {name: x.clone() for name, x in weights.items()}, left_out


class _Dtype:
    """Stands for numpy.dtype in a file: optimizers keep learning rates as numpy's numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiub]\d", code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")  # objects would be unpickled by numpy
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order


def _number(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.code)[0].item()


# What official checkpoints hold besides tensors and what torch allows: DINO's arguments, and numpy's numbers.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} asks for {wanted[1]}, which is not data and might run code: refused") from error
        raise ValueError(f"{path} is not a checkpoint of torch.save, or damaged") from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # What torch's reader meets in a file that is cut short or another thing.
        raise ValueError(f"{path} is not a checkpoint of torch.save, or cut short: {error}") from error


def _plain(path: Path, held: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors without the prefixes of DistributedDataParallel and torch.compile."""
    if others := [str(name) for name, x in held.items() if not isinstance(x, Tensor)]:
        raise ValueError(
            f"{path} has entries that are not tensors, and no {' or '.join(CONTAINERS)}: {', '.join(others)}"
        )
    if not held:
        raise ValueError(f"{path} has no tensors")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in held.items()}


def _said_backbone(loaded: dict[Any, Any]) -> str:
    """The name in timm of the `arch` that MoCo, AdCo, SimCLR and DINO note, or ''."""
    arguments = loaded.get("args")
    arch = loaded.get("arch", getattr(arguments, "arch", None))
    if not isinstance(arch, str):
        return ""
    patch = getattr(arguments, "patch_size", 16)
    if re.fullmatch(r"(vit|deit)_(tiny|small|base|large)", arch):
        arch = f"vit_{arch.split('_')[1]}_patch{patch}_224"
    return arch if timm.is_model(arch) else ""


def _read_folder(path: Path) -> Found:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name, arguments = str(config["architecture"]), dict(config.get("model_args", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a model of timm's on Hugging Face: no config.json with an architecture"
        ) from error
    tensors = _plain(path, read_safetensors(path / "model.safetensors"))
    return Found(tensors, name, {key: value for key, value in arguments.items() if key != "num_classes"})


def _sha256(path: Path) -> str:
    with (path / "model.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
