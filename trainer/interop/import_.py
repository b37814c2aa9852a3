"""Converts a checkpoint of another program to a run directory: config.yaml, weights.safetensors and imported.json."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from trainer.build import build_encoder
from trainer.config import Config
from trainer.config_file import dump, load
from trainer.interop.layouts import (
    LAYOUTS,
    OTHER_TENSORS,
    Layout,
    from_resnet_children,
    from_torchvision_vit,
    is_torchvision_vit,
)
from trainer.interop.read import read_checkpoint
from trainer.interop.weights import differences
from trainer.run.checkpoint import WEIGHTS
from trainer.run.directory import IMPORTED
from trainer.run.files import write_atomically, write_json

Tensors = dict[str, Tensor]  # by name

HEAD = ("0.weight", "0.bias", "2.weight", "2.bias")  # Linear, ReLU, Linear: the head of MoCo v2, AdCo and ours


def import_weights(path: Path, out: Path, backbone: str | None, overrides: list[str]) -> str:
    """Creates the run directory `out` from a checkpoint.

    Args:
        path: A file, or a folder in timm's format.
        out: The new run directory.
        backbone: timm's name of the network; None to use the name in the file.
        overrides: `key=value` of the configuration. `model.*` must describe the network of the file.

    Returns:
        A text that says what was imported, and what was not.

    Raises:
        ValueError: `out` exists, the file is not a checkpoint or contains more than data, or its tensors are not
            exactly those of the backbone. The message has all names that differ.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, nothing is overwritten")
    read = read_checkpoint(path)
    layout = find_layout(read.tensors)
    name = backbone or read.backbone
    if not name:
        raise ValueError(
            f"{path} ({layout.name}) does not contain the name of its network: give --backbone, such as resnet50"
        )
    networks, others = split_networks(read.tensors, layout)
    student = networks["student"]
    model: dict[str, Any] = {"backbone": name, "backbone_args": read.backbone_args if name == read.backbone else {}}
    has_head = "head.0.weight" in student
    if has_head:
        hidden, features = student["head.0.weight"].shape
        model |= {"dim": len(student["head.2.weight"]), "hidden": None if hidden == features else hidden}
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        values = {"run": {"dir": str(out), "epochs": 1}, "data": {"train": "not-given"}, "model": model}
        (partial / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        config = _with_attention_heads(load(partial / "config.yaml", overrides), layout)
        weights, left_out = fit(path, layout, networks, others, config)
        write_atomically(partial / "config.yaml", dump(config))
        (partial / WEIGHTS).write_bytes(save(weights))
        about = {"file": path.name, "sha256": _sha256(path), "layout": layout.name}
        write_json(partial / IMPORTED, {**about, "networks": list(networks), "left_out": left_out})
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    head = " with its head" if has_head else ""
    lines = [
        f"{config.model.backbone}{head} of {layout.name}: {' and '.join(networks)}, {len(weights)} tensors: {out}",
        f"left out: {', '.join(left_out)}" if left_out else "",
        f"not looked at: {', '.join(read.ignored)}" if read.ignored else "",
    ]
    return "\n".join(filter(None, lines))


def _with_attention_heads(config: Config, layout: Layout) -> Config:
    """Sets the 12 heads of MoCo v3's ViT-S (vits.py). timm's has 6, and the shapes of the tensors are the same."""
    model = config.model
    if layout.name != "MoCo v3" or not model.backbone.startswith("vit_small") or "num_heads" in model.backbone_args:
        return config
    arguments = {**model.backbone_args, "num_heads": 12}
    return config.model_copy(update={"model": model.model_copy(update={"backbone_args": arguments})})


def find_layout(tensors: Tensors) -> Layout:
    """Returns the first layout whose student prefix occurs in the tensor names."""
    if is_torchvision_vit(set(tensors)):
        return LAYOUTS[-1]
    return next(layout for layout in LAYOUTS if any(name.startswith(layout.student) for name in tensors))


def split_networks(tensors: Tensors, layout: Layout) -> tuple[dict[str, Tensors], list[str]]:
    """Splits the tensors of a checkpoint by network.

    Returns:
        The tensors of the student, and of the teacher if there is one, as `backbone.*` and `head.*` with timm's names;
        and the names of the tensors that belong to neither.
    """
    prefixes = {"student": layout.student, **({"teacher": layout.teacher} if layout.teacher is not None else {})}
    networks: dict[str, Tensors] = {network: {} for network in prefixes}
    others: list[str] = []
    for name, x in tensors.items():
        network = next((network for network, prefix in prefixes.items() if name.startswith(prefix)), None)
        if network is None:
            others.append(name)
        else:
            networks[network][name.removeprefix(prefixes[network])] = x
    head = all(f"fc.{name}" in networks["student"] for name in HEAD)
    return {network: _rename(own, head) for network, own in networks.items() if own}, others


def _rename(tensors: Tensors, head: bool) -> Tensors:
    if is_torchvision_vit(set(tensors)):
        tensors = {from_torchvision_vit(name): x for name, x in tensors.items()}
    if "0.weight" in tensors and "conv1.weight" not in tensors:
        tensors = {from_resnet_children(name): x for name, x in tensors.items()}
    return {
        f"head.{name.removeprefix('fc.')}" if head and name.startswith("fc.") else f"backbone.{name}": x
        for name, x in tensors.items()
    }


def fit(
    path: Path, layout: Layout, networks: dict[str, Tensors], others: list[str], config: Config
) -> tuple[Tensors, list[str]]:
    """Checks the tensors of each network against those of a new encoder.

    Args:
        path: The checkpoint, for messages.
        layout: Its layout.
        networks: The first output of `split_networks`.
        others: The second one.
        config: Describes the encoder.

    Returns:
        The tensors that `trainer.interop.weights` reads, and the names of those that an encoder does not have.

    Raises:
        ValueError: Other names or shapes differ, or values are not finite. The message has all of them.
    """
    modules = ("backbone.", "head.") if "head.0.weight" in networks["student"] else ("backbone.",)
    expected = {name: x for name, x in build_encoder(config).state_dict().items() if name.startswith(modules)}
    weights: Tensors = {}
    left_out = [*others]
    unknown = [name for name in others if not OTHER_TENSORS.search(name)]
    problems = {f"unknown: {', '.join(unknown)}": ["file"]} if unknown else {}  # and the networks that have them
    for network, tensors in networks.items():
        prefix = (layout.student if network == "student" else layout.teacher) or ""
        names = {name: name.removeprefix("backbone.") for name in tensors}
        extra = [name for name in tensors if name not in expected and OTHER_TENSORS.search(names[name])]
        left_out += [prefix + names[name] for name in extra]
        own = {name: x for name, x in tensors.items() if name not in extra}
        # Converted files and those older than PyTorch 0.4.1 have no batch counters, which no computation here uses.
        own |= {name: x for name, x in expected.items() if name.endswith("num_batches_tracked") and name not in own}
        if difference := differences(own, expected):
            problems.setdefault(difference, []).append(network)
        elif bad := [name for name, x in own.items() if not x.isfinite().all()]:
            problems.setdefault(f"not finite: {', '.join(bad)}", []).append(network)
        else:
            weights |= {f"{network}.{name}": own[name].to(x.dtype).contiguous() for name, x in expected.items()}
    if problems:
        text = "; ".join(f"{' and '.join(where)}: {what}" for what, where in problems.items()).replace("backbone.", "")
        raise ValueError(f"{path} ({layout.name}) is not of {config.model.backbone} as configured: {text}")
    return {name: x.clone() for name, x in weights.items()}, left_out


def _sha256(path: Path) -> str:
    with (path / "model.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
