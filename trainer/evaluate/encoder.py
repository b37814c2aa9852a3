"""The pre-trained encoder that an evaluation is of."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.encoder import Encoder
from trainer import checkpoint
from trainer.build import make_encoder
from trainer.config import Config
from trainer.distributed import Place, agree

STUDENT = "student.backbone."


class Pretrained(NamedTuple):
    """An encoder with trained backbone, where it is from, and the step of its checkpoint if it is from one."""

    encoder: Encoder
    path: Path
    step: int | None


def load_encoder(run: Path, config: Config, place: Place) -> Pretrained:
    """The student's backbone, from the first of these that there is; called by all ranks.

    The file eval.weights; the newest good checkpoint in `run`; the file weights.safetensors in `run`, which other
    programs may have written. Its projection head is not loaded. Raises ValueError if there is none, or it does not
    fit the configuration's backbone.
    """
    encoder = make_encoder(config).to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved = None if config.eval.weights else checkpoint.newest(run / "checkpoints")
    path = saved or Path(config.eval.weights or run / checkpoint.WEIGHTS)
    if saved and not (saved / checkpoint.WEIGHTS).is_file():
        checkpoint.load(saved, {"student": {f"backbone.{k}": x for k, x in encoder.backbone.state_dict().items()}})
        return Pretrained(encoder, saved, checkpoint.step_of(saved))
    error = None
    if not saved and not path.is_file():
        error = f"{path}: no such file" if config.eval.weights else f"{run} has no usable checkpoint"
    else:
        error = _fill(encoder, path / checkpoint.WEIGHTS if saved else path)
    agree(error)
    return Pretrained(encoder, path, checkpoint.step_of(saved) if saved else None)


def _fill(encoder: Encoder, path: Path) -> str | None:
    """Load the file into the encoder; what is wrong with it, if anything."""
    try:
        weights = {k.removeprefix(STUDENT): x for k, x in load_file(path).items() if k.startswith(STUDENT)}
        if not weights:
            return f"{path}: has no tensors called {STUDENT}…"
        encoder.backbone.load_state_dict(weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        return f"{path}: {' '.join(str(error).split())}"
    return None
