"""Trainings of a few steps under any engine and their unsharded results, for tests on several ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.trainer.small import VIT, small_config
from trainer.build import initialise_negatives
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.base import unshard
from trainer.train_step import Rates, TrainStep

STEPS, SIDE = 10, 16
# small_images: in bf16 torch 2.14's CPU convolution of stride 2 over single pixels gives undefined gradients.
NARROW = {"backbone": "resnet18", "backbone_args": {"channels": [8, 8, 8, 16], "layers": [1, 1, 1, 1]}, "dim": 16}
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    # BatchNorm over all ranks, because otherwise batch statistics would depend on the number of ranks.
    "resnet": {"model": {**NARROW, "small_images": True, "stem_stride": 2}, "method": {"bn": "sync"}},
    "vit": {"model": VIT, "method": {"bn": "local"}},
}


class Outcome(NamedTuple):
    """Result of a training: losses (mean over ranks) and gradient norms of each step, and unsharded tensors by name.

    `bank` has the queue's tensors for methods with a queue.
    """

    losses: list[float]
    norms: list[float]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    bank: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def make_config(network: str, **sections: dict[str, Any]) -> Config:
    """Return the configuration of a run of `network`, resnet or vit, with changes; its images need no files."""
    values: dict[str, dict[str, Any]] = {
        "data": {"train": "none", "batch_size": 16, "views": [{"size": SIDE}] * 3},
        "method": {"teacher_momentum": 0.9},
        "bank": {"size": 30, "init": "random", "temperature": 0.2},  # high, so that distant negatives have weight
        "optim": {"lr": 0.05, "clip": 1.0},
    }
    for changes in (NETWORKS[network], sections):
        for name, change in changes.items():
            values[name] = {**values.get(name, {}), **change}
    return small_config(Path("none"), Path("none"), **values)


def make_rank_info(ranks_per_node: int | None = None) -> RankInfo:
    world_size = dist.get_world_size()
    return RankInfo(torch.device("cpu"), dist.get_rank(), world_size, ranks_per_node or world_size)


def build_train_step(config: Config, rank_info: RankInfo) -> TrainStep:
    train_step = TrainStep(config, rank_info)
    initialise_negatives(train_step.method, config, rank_info, range(config.data.batch_size))  # type: ignore[arg-type]
    return train_step


def train(
    train_step: TrainStep, config: Config, steps: int = STEPS, first: int = 0, spoil: int | None = None
) -> tuple[list[float], list[float]]:
    """Losses, mean over ranks, and gradient norms of steps first, first + 1, …; the same images for any ranks.

    spoil: the rank that gets a picture that is not finite.
    """
    losses, norms = [], []
    parts = train_step.accumulate
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        # The images of a part are those of one rank alone, spread over the ranks.
        pictures = (
            torch.randn(config.data.batch_size, 3, 4, 4, generator=generator)
            .repeat_interleave(4, 2)
            .repeat_interleave(4, 3)
        )
        noise = torch.randn(len(config.data.views), *pictures.shape, generator=generator)
        images = (pictures + 0.3 * noise).unflatten(1, (parts, dist.get_world_size(), -1))
        views = list(images[:, :, dist.get_rank()].flatten(1, 2))
        if spoil == dist.get_rank():
            views[1][0] = torch.nan
        rates = Rates(config.optim.lr, config.bank.lr, config.method.teacher_momentum)
        metrics, check = train_step.step(views, step, rates)
        check()
        loss = metrics["loss"].clone()
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
        norms.append(float(metrics["grad_norm"]))
    return losses, norms


def outcome(train_step: TrainStep, losses: list[float], norms: list[float]) -> Outcome:
    state = train_step.state(0)
    optimizer = {f"{name}.{key}": x for name, slots in state["optimizer"].items() for key, x in slots.items()}
    negatives = {**state.get("bank", {}), **state.get("queue", {})}
    parts = (state["student"], state.get("teacher", {}), negatives, optimizer)
    return Outcome(losses, norms, *({name: x.clone() for name, x in unshard(part).items()} for part in parts))


def run(config: Config, ranks_per_node: int | None = None) -> Outcome:
    train_step = build_train_step(config, make_rank_info(ranks_per_node))
    history = train(train_step, config)
    return outcome(train_step, *history)
