"""The training step that benchmarks time: random images, random negatives, learning rates of zero.

Neither images nor weights change how long a step takes, so no data set is needed, and rates of zero keep the weights
finite.
"""

from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from trainer.bench.harness import environment
from trainer.build import initialise_negatives
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.train_step import Rates, TrainStep


def build_step(config: Config, rank_info: RankInfo) -> TrainStep:
    """Build the training step of a configuration with random negatives."""
    train_step = TrainStep(config, rank_info)
    config = config.model_copy(update={"bank": config.bank.model_copy(update={"init": "random"})})
    initialise_negatives(train_step.method, config, rank_info, range(1 << 30))  # type: ignore[arg-type]
    return train_step


def warm_up_steps(train_step: TrainStep, steps: int) -> int:
    """Return `steps`, or as many more as a step with a CUDA graph needs to be captured and replayed once."""
    return max(steps, train_step.graph.warm_up + 2) if train_step.graph else steps


def describe(config: Config, rank_info: RankInfo) -> dict[str, Any]:
    """Describe the step and the circumstances of a measurement, for its result file."""
    return {
        "backbone": config.model.backbone,
        "batch_size": config.data.batch_size,
        "negatives": config.bank.size,
        "device": rank_info.device.type,
        "ranks": rank_info.world_size,
        **environment(),
    }


def title(result: dict[str, Any]) -> str:
    """Return the title of the table of a result that contains `describe`."""
    return "{backbone}, batch {batch_size}, {negatives} negatives".format(**result)


def frozen_rates(config: Config) -> Rates:
    """Return learning rates of zero."""
    return Rates(lr=0.0, bank_lr=0.0, teacher_momentum=config.method.teacher_momentum)


def random_batch(config: Config, rank_info: RankInfo) -> Batch:
    """Return this rank's batch of random views on the device, uint8 [B, S_v, S_v, 3] each."""
    images, generator = config.data.batch_size // rank_info.world_size, torch.Generator().manual_seed(rank_info.rank)
    views = [
        torch.randint(256, (images, view.size, view.size, 3), dtype=torch.uint8, generator=generator)
        for view in config.data.views
    ]
    return Batch([view.to(rank_info.device) for view in views], torch.arange(images), [])


def random_views(config: Config, rank_info: RankInfo) -> list[Tensor]:
    """Return this rank's batch of random views on the device, uint8 [B, S_v, S_v, 3] each."""
    return random_batch(config, rank_info).views
