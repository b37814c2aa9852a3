"""Loads the student or the teacher of a run directory.

A pre-training run has both in `checkpoints/step-N/weights.safetensors`. A run directory made by
`python -m trainer import` has one `weights.safetensors`, whose networks may lack the head. Tensor names are those of
`models.encoder.Encoder` after `student.` or `teacher.`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor, nn

from models.encoder import Encoder
from models.teacher import make_teacher
from trainer.build import build_encoder
from trainer.config import Config
from trainer.distributed import raise_on_all_ranks
from trainer.run import checkpoint
from trainer.run.checkpoint import WEIGHTS
from trainer.run.directory import read_config
from trainer.run.files import exists, unreadable

Network = Literal["student", "teacher"]


class CheckpointChoice(NamedTuple):
    """Selects a network of a run directory, and the step of its checkpoint (None: the newest undamaged one)."""

    network: Network = "student"
    step: int | None = None


NEWEST = CheckpointChoice()


def load_encoder(run: Path, config: Config, choice: CheckpointChoice = NEWEST) -> tuple[Encoder, int]:
    """Loads a network of a run directory into host memory. Called by all ranks.

    Args:
        run: The run directory.
        config: The run's configuration, or another one with the same backbone. A head or predictor that the file
            lacks stays untrained; one that the encoder lacks is ignored.
        choice: The network and the checkpoint.

    Returns:
        The network, and the step of its checkpoint (0 for an imported model).

    Raises:
        ValueError: There are no such weights, or they do not fit the configuration. Raised on all ranks.
    """
    while True:
        path, step = find_weights(run, choice.step)
        try:
            encoder = read_encoder(path, config, choice.network)
            break
        except ValueError:
            # The run may be training and have deleted this checkpoint, because it has newer ones.
            imported = path.parent == run
            if imported or choice.step is not None or checkpoint.newest(run / "checkpoints") in (None, path.parent):
                raise
    error = None
    try:
        if difference := architecture_difference(read_config(run), config):
            error = (
                f"{run} has another architecture than the configuration, with tensors of the same shapes: "
                f"{difference}; use its model.backbone_args, see {run / 'config.yaml'}"
            )
    except (ValueError, OSError) as failure:
        error = str(failure)
    raise_on_all_ranks(error)
    return encoder, step


def architecture_difference(trained: Config, config: Config) -> str:
    """Describes the first module in which the backbones of two configurations compute something else; '' if none does.

    The number of attention heads, an activation or a stride differ without changing the shape of any tensor.

    Args:
        trained: The configuration that the weights are from.
        config: The configuration that they are loaded for.
    """
    if trained.model == config.model:
        return ""
    with torch.device("meta"):
        modules = [dict(build_encoder(x).backbone.named_modules()) for x in (trained, config)]
    for name in modules[0] | modules[1]:
        theirs, ours = (_computation(own.get(name)) for own in modules)
        if theirs != ours:
            return f"{name or 'backbone'} is {theirs}, the configuration has {ours}"
    return ""


def _computation(module: nn.Module | None) -> str:
    """Describes what a module computes without its children and without dropout, which only training has."""
    if module is None or isinstance(module, nn.Identity | nn.Dropout | DropPath):
        return "nothing"
    values = {key: getattr(module, key, None) for key in ("num_heads", "global_pool")}
    shown = [f"{key}={x}" for key, x in values.items() if isinstance(x, int | str)]
    return f"{type(module).__name__}({', '.join(filter(None, (module.extra_repr(), *shown)))})"


def find_weights(run: Path, step: int | None = None) -> tuple[Path, int]:
    """Returns the weights file of an imported model or of a checkpoint, and the step. Called by all ranks.

    Args:
        run: The run directory.
        step: The step of the checkpoint; None for the newest undamaged one.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged. Raised on all ranks.
    """
    imported = run / WEIGHTS
    if exists(imported):
        if step is not None:
            raise ValueError(f"{run} is an imported model: it has no checkpoint of step {step}")
        return imported, 0
    folder = run / "checkpoints"
    path = checkpoint.newest(folder) if step is None else checkpoint.find(folder, step)
    if path is None:
        raise ValueError(f"{run} has no usable checkpoint")
    return path / WEIGHTS, checkpoint.step_of(path)


def read_encoder(path: Path, config: Config, network: Network = "student") -> Encoder:
    """Returns a network of a weights file in host memory. Called by all ranks; see `load_encoder`."""
    encoder = build_encoder(config)
    if network == "teacher":
        encoder = make_teacher(encoder)
    error = None
    try:
        _fill(encoder, path, network)
    except ValueError as failure:
        error = str(failure)
    except OSError as failure:
        error = unreadable(failure)
    raise_on_all_ranks(error)
    return encoder


def _fill(encoder: Encoder, path: Path, network: Network) -> None:
    tensors = read_safetensors(path)
    own = {name.removeprefix(f"{network}."): x for name, x in tensors.items() if name.startswith(f"{network}.")}
    if not own:
        raise ValueError(f"{path} has no {network}, only {', '.join(sorted({name.split('.')[0] for name in tensors}))}")
    state = encoder.state_dict()
    common = {"backbone"} | {_module(name) for name in own} & {_module(name) for name in state}
    own = {name: x for name, x in own.items() if _module(name) in common}
    expected = {name: x for name, x in state.items() if _module(name) in common}
    if difference := differences(own, expected):
        raise ValueError(f"{path} does not fit the configuration: {difference}")
    encoder.load_state_dict(state | own)


def _module(name: str) -> str:
    """Returns backbone, head or predictor: the module of the encoder that a tensor belongs to."""
    return name.split(".")[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file.

    Raises OSError if it cannot be read, ValueError if it is damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            file.read(1)  # safetensors says that a file does not exist when it cannot be read
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or cut short: {error}") from error


def differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describes all names and shapes in which two sets of tensors differ; '' if they are the same."""
    lists = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "other shapes": [
            f"{name} is {list(given[name].shape)}, need {list(x.shape)}"
            for name, x in expected.items()
            if name in given and given[name].shape != x.shape
        ],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names)


def to_device(encoder: Encoder, device: torch.device) -> Encoder:
    """Moves an encoder to a device, in the memory format that training uses."""
    return encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
