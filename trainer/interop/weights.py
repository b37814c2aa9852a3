"""The learned networks of a run directory: of a checkpoint of a pre-training, or of an imported model.

A pre-training keeps them in checkpoints/step-N/weights.safetensors, `python -m trainer import` in weights.safetensors
of the run directory itself. In both the tensors are called student.… and teacher.… as in `models.encoder.Encoder`; an
imported network may lack the head.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.encoder import Encoder
from models.teacher import make_teacher
from trainer.build import build_encoder
from trainer.config import Config
from trainer.distributed import raise_on_all_ranks
from trainer.run import checkpoint
from trainer.run.checkpoint import WEIGHTS

Network = Literal["student", "teacher"]


class CheckpointChoice(NamedTuple):
    """network: of the two that a run has. step: of the checkpoint; None for the newest good one."""

    network: Network = "student"
    step: int | None = None


NEWEST = CheckpointChoice()


def load_encoder(run: Path, config: Config, which: CheckpointChoice = NEWEST) -> tuple[Encoder, int]:
    """A network of the run directory in host memory, and the step it is of (0 for an imported one).

    `config` is that of the run, or another of the same backbone: a head or predictor that is not in the file stays
    untrained, one that the encoder lacks is left. Called by all ranks. Raises ValueError, on all of them, where there
    are no weights, or they do not fit the configuration.
    """
    network, step = which
    encoder = build_encoder(config)
    if network == "teacher":
        encoder = make_teacher(encoder)
    path, found = run / WEIGHTS, 0
    if path.exists() and step is not None:
        raise ValueError(f"{run} is an imported model: it has no checkpoint of step {step}")
    if not path.exists():
        folder = run / "checkpoints"
        saved = checkpoint.newest(folder) if step is None else checkpoint.find(folder, step)
        if saved is None:
            raise ValueError(f"{run} has no usable checkpoint")
        path, found = saved / WEIGHTS, checkpoint.step_of(saved)
        if not path.exists():  # as the first versions of this program left them
            checkpoint.load(saved, {network: encoder.state_dict()})
            return encoder, found
    error = None
    try:
        _fill(encoder, path, network)
    except (ValueError, OSError) as refusal:
        error = str(refusal)
    raise_on_all_ranks(error)
    return encoder, found


def _fill(encoder: Encoder, path: Path, network: Network) -> None:
    tensors = read_safetensors(path)
    own = {name.removeprefix(f"{network}."): x for name, x in tensors.items() if name.startswith(f"{network}.")}
    if not own:
        raise ValueError(f"{path} has no {network}, only {', '.join(sorted({name.split('.')[0] for name in tensors}))}")
    state = encoder.state_dict()
    parts = {"backbone"} | {_part(name) for name in own} & {_part(name) for name in state}
    own = {name: x for name, x in own.items() if _part(name) in parts}
    wanted = {name: x for name, x in state.items() if _part(name) in parts}
    if difference := differences(own, wanted):
        raise ValueError(f"{path} does not fit the configuration: {difference}")
    encoder.load_state_dict(own, strict=False)  # but for the parts that are not there, they are the same names


def _part(name: str) -> str:
    """backbone, head or predictor."""
    return name.split(".")[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file. Raises ValueError if it is cut short or another thing."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or cut short: {error}") from error


def differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Every name and shape in which two sets of tensors differ, in words; '' if there is none."""
    said = []
    if missing := [name for name in wanted if name not in given]:
        said.append(f"missing: {', '.join(missing)}")
    if unknown := [name for name in given if name not in wanted]:
        said.append(f"unknown: {', '.join(unknown)}")
    shapes = [
        f"{name} is {list(given[name].shape)}, need {list(x.shape)}"
        for name, x in wanted.items()
        if name in given and given[name].shape != x.shape
    ]
    if shapes:
        said.append(f"other shapes: {', '.join(shapes)}")
    return "; ".join(said)


def to_device(encoder: Encoder, device: torch.device) -> Encoder:
    """As training has it there."""
    return encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
