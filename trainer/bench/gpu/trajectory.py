"""Short trainings without data, whose losses are compared between devices, types, engines and numbers of ranks."""

from typing import Any

import torch
from torch import Tensor

from trainer.bench.synthetic import build_step
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.pretrain import rates_at
from trainer.train_step import TrainStep

_SIDE = 32

# Networks whose statistics do not depend on the number of ranks: BatchNorm over all ranks, or none.
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {
        "model": {
            "backbone": "resnet18",
            "backbone_args": {"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]},
            "small_images": True,
            "stem_stride": 2,
            "dim": 64,
        },
        "method": {"bn": "sync"},
    },
    "vit": {
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"depth": 4, "embed_dim": 64, "num_heads": 4, "patch_size": 8, "img_size": _SIDE},
            "dim": 64,
        },
        "method": {"bn": "local"},
    },
}

METHODS: dict[str, dict[str, Any]] = {
    "adco": {},
    "acssl": {"method": {"name": "acssl"}},
    "caco": {"method": {"name": "caco"}},
    "moco": {"method": {"name": "moco"}},
    "simclr": {"method": {"name": "simclr"}},
    "byol": {"method": {"name": "byol"}, "model": {"predictor": 64}},
}


def make_config(network: str, device: str, *changes: dict[str, Any], batch_size: int = 32) -> Config:
    """Return the configuration of a training of two views of 32 pixels, with changes to its sections."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "none", "device": device, "epochs": 1, "precision": "fp32"},
        "data": {"train": "none", "batch_size": batch_size, "workers": 0, "views": [{"size": _SIDE}] * 2},
        # A high temperature, so that distant negatives have weight.
        "bank": {"size": 512, "init": "random", "temperature": 0.2},
        "optim": {"lr": 0.05},
    }
    for change in (NETWORKS[network], *changes):
        for name, settings in change.items():
            values[name] = {**values.get(name, {}), **settings}
    return Config.model_validate(values)


def make_views(config: Config, rank_info: RankInfo, step: int) -> list[Tensor]:
    """Return this rank's views of a step, float32 [B, 3, S, S]: noise on images of 4 x 4 fields.

    All ranks together have the images of one rank alone, on any device.
    """
    generator = torch.Generator().manual_seed(step)
    size, batch_size = config.data.views[0].size, config.data.batch_size
    fields = torch.randn(batch_size, 3, 4, 4, generator=generator)
    images = fields.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    noise = torch.randn(len(config.data.views), *images.shape, generator=generator)
    views = (images + 0.3 * noise).chunk(rank_info.world_size, 1)[rank_info.rank]
    return [view.to(rank_info.device).contiguous(memory_format=torch.channels_last) for view in views]


def train(config: Config, rank_info: RankInfo, steps: int, nudge: float = 0.0) -> list[float]:
    """Train from the configuration's seed and return this rank's losses.

    Args:
        config: From `make_config`.
        rank_info: This process, on the device that trains.
        steps: Number of steps.
        nudge: Change each initial weight by about this share of itself: how far the losses then move is how far
            rounding errors alone can move them.
    """
    train_step = build_step(config, rank_info)
    if nudge:
        _nudge(train_step, nudge)
    return take_steps(train_step, config, rank_info, steps)


def take_steps(train_step: TrainStep, config: Config, rank_info: RankInfo, steps: int) -> list[float]:
    """Take the first steps of a training and return this rank's losses."""
    losses = []
    for step in range(steps):
        metrics = train_step.step(make_views(config, rank_info, step), step, rates_at(config, 0, steps)).metrics
        losses.append(metrics["loss"].detach())
    return torch.stack(losses).tolist()  # the only time that the host waits for the device


def _nudge(train_step: TrainStep, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in train_step.method.student.parameters():
            p.mul_(1 + share * torch.randn(p.shape, generator=generator).to(p.device))


def difference(losses: list[float], reference: list[float]) -> float:
    """Return the largest difference of two trajectories, as a share of the reference's largest loss."""
    pairs = zip(losses, reference, strict=True)
    return max(abs(a - b) for a, b in pairs) / max(map(abs, reference))


def mean_difference(losses: list[float], reference: list[float]) -> float:
    """Return the difference of the mean losses of two trajectories, as a share of the reference's."""
    return abs(sum(losses) - sum(reference)) / abs(sum(reference))
