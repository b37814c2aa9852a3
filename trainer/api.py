"""The Python interface: a trained network as a plain module with its preprocessing, and features of images.

    from trainer import api

    model = api.load("runs/demo")                        # a run, or an imported checkpoint
    y_BD = model.backbone(model.preprocess(image)[None])
    x_ND = api.features(model, images)                   # a numpy array

docs/python.md has further examples: pre-training from a `Config`, data sets from Python, and the bank of negatives in
another training loop.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.cpu import render_center
from data.normalize import normalize
from data.paths import absolute
from data.sources.dataset import to_pixels
from models.encoder import Encoder
from trainer.config import Config
from trainer.evaluate.features import image_size
from trainer.interop.weights import CheckpointChoice, Network, load_encoder
from trainer.run.directory import read_config

__all__ = ["Pretrained", "features", "load"]


class Pretrained(NamedTuple):
    """A trained network in evaluation mode.

    Attributes:
        encoder: The backbone with its head; `encoder([x])` gives unit embeddings.
        config: The configuration of its run.
        step: Step of its checkpoint; 0 for an imported model.
    """

    encoder: Encoder
    config: Config
    step: int

    @property
    def backbone(self) -> torch.nn.Module:
        """The timm model without classifier: normalised images [B, 3, S, S] to features [B, D]."""
        return self.encoder.backbone

    def preprocess(self, image: Any) -> Tensor:
        """Resize, crop the centre and normalise, as evaluations do.

        Args:
            image: In one of the forms that `data.sources.dataset.to_pixels` takes, of any size.

        Returns:
            float32 [3, S, S] in host memory; S is eval.size, or the size of the first view.
        """
        view = render_center(to_pixels(image), image_size(self.config), self.config.eval.crop)
        return normalize(torch.from_numpy(view)[None], torch.device("cpu"))[0]


def load(run: str | Path, network: Network = "student", step: int | None = None, device: str = "cpu") -> Pretrained:
    """Load a network of a run directory or of an imported checkpoint.

    Args:
        run: The directory, written by `pretrain` or `import`.
        network: The student or the teacher.
        step: The checkpoint's step; None for the newest undamaged one.
        device: Where to put the network.

    Raises:
        ValueError: There is no such run, network or checkpoint.
    """
    path = Path(absolute(str(run)))
    config = read_config(path)
    with _process_group():
        encoder, step = load_encoder(path, config, CheckpointChoice(network, step))
    return Pretrained(encoder.eval().to(device), config, step)


@torch.inference_mode()
def features(model: Pretrained, images: Iterable[Any], batch_size: int = 256) -> NDArray[np.float32]:
    """Compute the backbone's features of images.

    Args:
        model: The result of `load`.
        images: Images as `Pretrained.preprocess` takes them.
        batch_size: Number of images that the network takes at a time.

    Returns:
        float32 [N, D], not normalised.
    """
    device = next(model.backbone.parameters()).device
    pending: list[Tensor] = []
    done: list[Tensor] = []

    def run() -> None:
        done.append(model.backbone(torch.stack(pending).to(device)).float().cpu())
        pending.clear()

    for image in images:
        pending.append(model.preprocess(image))
        if len(pending) == batch_size:
            run()
    if pending:
        run()
    if not done:
        raise ValueError("features: got no images, need at least one")
    return torch.cat(done).numpy()


@contextmanager
def _process_group() -> Iterator[None]:
    """Use the caller's process group, or one of this process alone for the time of the `with` block."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
