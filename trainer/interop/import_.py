"""Converts a checkpoint of another program to a run directory: config.yaml, weights.safetensors and imported.json."""

import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from data.normalize import MEAN, STD
from trainer.build import build_encoder
from trainer.config import Config
from trainer.config_file import dump, load
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.interop.architecture import (
    backbone_name,
    find_architecture,
    normalisation,
    position_kind,
    to_imagenet_statistics,
)
from trainer.interop.layouts import LAYOUTS, OTHER_TENSORS, Layout, Tensors, find_layout, strip_common_prefix, to_timm
from trainer.interop.read import read_checkpoint, weight_files
from trainer.interop.weights import differences
from trainer.run.checkpoint import WEIGHTS
from trainer.run.directory import IMPORTED
from trainer.run.files import exists, write_atomically, write_json

log = logging.getLogger(__name__)

STEM = ("small_images", "stem_stride", "stem_padding")  # keys of section `model` that change a ResNet's first layers
HEAD = ("0.weight", "0.bias", "2.weight", "2.bias")  # Linear, ReLU, Linear: the head of MoCo v2, AdCo and ours


def import_weights(
    path: Path,
    out: Path,
    backbone: str | None,
    overrides: list[str],
    backbone_args: list[str] | None = None,
    ignore: list[str] | None = None,
) -> str:
    """Creates the run directory `out` from a checkpoint.

    Args:
        path: A file, or a folder in the format of timm or transformers.
        out: The new run directory.
        backbone: timm's name of the network; None to use the name in the file.
        overrides: `key=value` of the configuration. `model.*` must describe the network of the file.
        backbone_args: `key=value` of `model.backbone_args`, or a mapping of them in YAML or JSON. They replace what the
            file says, one by one.
        ignore: Patterns such as `prototypes.*`. Tensors whose names in the file match one are left out.

    Returns:
        A text that says what was imported, where the architecture comes from, and what was left out and why.

    Raises:
        ValueError: `out` exists, the file is not a checkpoint or contains more than data, something of the
            architecture is open, or the tensors are not exactly those of the backbone. The message has all names that
            differ.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, nothing is overwritten")
    read = read_checkpoint(path)
    tensors, ignored = _leave_out(strip_common_prefix(read.tensors), ignore or [])
    layout = find_layout(set(tensors))
    networks, others = split_networks(tensors, layout)
    student = {name.removeprefix("backbone."): x for name, x in networks["student"].items()}
    if layout == LAYOUTS[-1]:  # no name of a method is left in a linear probe's file or an encoder alone
        layout = layout._replace(name=position_kind(student) or layout.name)
    stored_name, named = backbone_name(read.settings, layout, student)
    name = backbone or stored_name
    if not name:
        arch = f" (its arch is {read.settings['arch']}, which timm has not)" if "arch" in read.settings else ""
        raise ValueError(
            f"{path} ({layout.name}) does not contain the name of its network{arch}: give --backbone, such as resnet50"
        )
    model: dict[str, Any] = {"backbone": name}
    has_head = "head.0.weight" in networks["student"]
    if has_head:
        hidden, features = networks["student"]["head.0.weight"].shape
        dim = len(networks["student"]["head.2.weight"])
        model |= {"dim": dim, "hidden": None if hidden == features else hidden}
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        values = {"run": {"dir": str(out), "epochs": 1}, "data": {"train": "not-given"}, "model": model}
        (partial / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        config = load(partial / "config.yaml", overrides)
        given = config.model.model_copy(
            update={"backbone_args": config.model.backbone_args | parse_arguments(backbone_args or [])}
        )
        try:
            found = find_architecture(
                read.settings, layout, student, set(tensors), config.model.backbone, named or bool(backbone), given
            )
        except ValueError as error:
            raise ValueError(f"{path} ({layout.name}): {error}") from error
        config = config.model_copy(update={"model": given.model_copy(update=found.model)})
        if found.size and config.eval.size is None:
            config = config.model_copy(update={"eval": config.eval.model_copy(update={"size": found.size})})
        note = _normalise(read.settings, layout, config.model.backbone, networks)
        weights, left_out = fit(path, layout, networks, others, config)
        write_atomically(partial / "config.yaml", dump(config))
        (partial / WEIGHTS).write_bytes(save(weights))
        about = {"file": path.name, "sha256": _sha256(path), "layout": layout.name, "networks": list(networks)}
        write_json(partial / IMPORTED, {**about, "architecture": found.notes, "left_out": [*left_out, *ignored]})
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    head = " with its head" if has_head else ""
    only_teacher = layout.teacher and not any(name.startswith(layout.student) for name in tensors)
    networks_text = "the teacher, as the student" if only_teacher else " and ".join(networks)
    lines = [
        f"{config.model.backbone}{head} of {layout.name}: {networks_text}, {len(weights)} tensors: {out}",
        f"architecture: {', '.join(found.notes)}" if found.notes else "",
        note,
        f"left out: {', '.join(left_out)} (not of the encoder)" if left_out else "",
        f"left out: {', '.join(ignored)} (--ignore)" if ignored else "",
        f"not looked at: {', '.join(read.ignored)}" if read.ignored else "",
    ]
    return "\n".join(filter(None, lines))


def parse_arguments(texts: list[str]) -> dict[str, Any]:
    """Returns the arguments in `key=value` and in mappings such as `{key: value}`."""
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        is_mapping = text.lstrip().startswith("{")
        try:
            parsed = yaml.safe_load(text if is_mapping else value)
        except yaml.YAMLError as error:
            raise ValueError(f"--backbone-args: {text!r} is not YAML: {error}") from error
        if not is_mapping and not (key and equals):
            raise ValueError(f"--backbone-args: got {text!r}, need key=value or {{key: value}}")
        arguments |= parsed if is_mapping else {key: parsed}
    return arguments


def initial_weights(config: Config, rank_info: RankInfo) -> Path:
    """Returns the run directory that `model.weights` names. Called by all ranks.

    A checkpoint of another program is first imported to `initial` in the run directory, for the configuration's
    backbone; what an earlier start imported there is replaced.

    Raises ValueError, on all ranks, if it cannot be imported.
    """
    path = Path(str(config.model.weights))
    if not exists(path) or exists(path / "config.yaml") or exists(path / "checkpoints"):
        return path
    imported, error, model = Path(config.run.dir) / "initial", None, config.model
    if rank_info.rank == 0:
        try:
            if imported.exists():
                shutil.rmtree(imported)
            arguments = [f"{key}={json.dumps(value)}" for key, value in model.backbone_args.items()]
            stem = [f"model.{key}={json.dumps(getattr(model, key))}" for key in STEM]
            log.info("%s", import_weights(path, imported, model.backbone, stem, arguments))
        except (ValueError, OSError) as failure:
            error = f"model.weights: {failure}"
    raise_on_all_ranks(error)
    return imported


def _leave_out(tensors: Tensors, patterns: list[str]) -> tuple[Tensors, list[str]]:
    """Returns the tensors that match no pattern, and the names of the others."""
    if unused := [pattern for pattern in patterns if not fnmatch.filter(tensors, pattern)]:
        raise ValueError(
            f"--ignore: no tensor matches {' or '.join(unused)}; the names begin with "
            + ", ".join(sorted({name.rpartition(".")[0].partition(".")[0] or name for name in tensors})[:20])
        )
    ignored = [name for name in tensors if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    kept = {name: x for name, x in tensors.items() if name not in set(ignored)}
    if not kept:
        raise ValueError(f"--ignore {' '.join(patterns)} leaves no tensor")
    return kept, ignored


def split_networks(tensors: Tensors, layout: Layout) -> tuple[dict[str, Tensors], list[str]]:
    """Splits the tensors of a checkpoint by network.

    Returns:
        The tensors of the student, and of the teacher if there is one, as `backbone.*` and `head.*` with timm's names;
        and the names of the tensors that belong to neither. A teacher without a student becomes the student.
    """
    prefixes = {"student": layout.student, **({"teacher": layout.teacher} if layout.teacher is not None else {})}
    longest_first = sorted(prefixes, key=lambda network: -len(prefixes[network]))
    networks: dict[str, Tensors] = {network: {} for network in prefixes}
    others: list[str] = []
    for name, x in tensors.items():
        network = next((network for network in longest_first if name.startswith(prefixes[network])), None)
        if network is None:
            others.append(name)
        else:
            networks[network][name.removeprefix(prefixes[network])] = x
    if not networks["student"]:
        networks = {"student": networks["teacher"]}
    head = all(f"fc.{name}" in networks["student"] for name in HEAD)
    return {network: _rename(own, head) for network, own in networks.items() if own}, others


def _rename(tensors: Tensors, head: bool) -> Tensors:
    return {
        f"head.{name.removeprefix('fc.')}" if head and name.startswith("fc.") else f"backbone.{name}": x
        for name, x in to_timm(tensors).items()
    }


def _normalise(settings: dict[str, Any], layout: Layout, name: str, networks: dict[str, Tensors]) -> str:
    """Adapts ViTs to images normalised by ImageNet's statistics; returns a note unless these were used in training."""
    known = normalisation(settings, layout, name)
    if known is None:
        return (
            "normalisation: not in the file; images here are normalised by ImageNet's mean and standard deviation. "
            "For timm's weights, --backbone with their tag, such as vit_base_patch16_224.augreg_in21k, gives theirs"
        )
    if all(abs(x - y) < 1e-3 for x, y in zip((*known[0], *known[1]), (*MEAN, *STD), strict=True)):
        return ""
    text = f"normalisation: trained with mean {list(known[0])} and standard deviation {list(known[1])}; "
    if "backbone.patch_embed.proj.bias" not in networks["student"]:
        return text + "images here are normalised by ImageNet's, so features will differ"
    for network, tensors in networks.items():
        networks[network] = to_imagenet_statistics(tensors, *known)
    return text + "patch_embed.proj was changed to give the same features for ImageNet's, which are used here"


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
    networks = {network: _convert_by_timm(tensors, config, expected) for network, tensors in networks.items()}
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


def _convert_by_timm(tensors: Tensors, config: Config, expected: Tensors) -> Tensors:
    """Applies timm's converter for the names of an architecture's authors, if the names are not timm's.

    The converter is not used where it resizes tensors, nor for ViTs, whose names `layouts.py` has.
    """
    if "backbone.blocks.0.gamma_1" in expected:  # BEiT and EVA, whose files look like those of DeiT III, a plain ViT
        tensors = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): x for name, x in tensors.items()}
    backbone = {name.removeprefix("backbone."): x for name, x in tensors.items() if name.startswith("backbone.")}
    with torch.device("meta"):
        model = build_encoder(config).backbone
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    missing = {name for name in expected if name.startswith("backbone.")} - tensors.keys()
    if not missing or convert is None or isinstance(model, VisionTransformer):
        return tensors
    try:
        converted: Tensors = convert(dict(backbone), model)
    except (LookupError, AttributeError, TypeError, AssertionError, RuntimeError, ValueError):
        # Converters expect names that the file of another network lacks, and modules that the model lacks. The check
        # of all names and shapes then says what differs.
        return tensors
    resized = {x.numel() for x in converted.values()} - {x.numel() for x in backbone.values()}
    # A renamed classifier is unknown, too, but `fit` leaves it out.
    new = [name for name in converted if name not in backbone and not OTHER_TENSORS.search(name)]
    if resized or any(f"backbone.{name}" not in expected for name in new):
        return tensors
    others = {name: x for name, x in tensors.items() if not name.startswith("backbone.")}
    return others | {f"backbone.{name}": x for name, x in converted.items()}


def _sha256(path: Path) -> str:
    """Returns the hash of the file. For a folder or an index of several files it is the hash of their hashes."""
    hashes = []
    for part in weight_files(path):
        with part.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
