"""A linear classifier on a backbone: its training, with the backbone frozen or not, and its accuracy.

B images of a rank's batch, D features, C classes.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import train_batches
from data.order import steps_per_epoch
from data.sources.open import Source
from data.views import Augment, View
from models.encoder import Encoder
from trainer.build import autocast_dtype
from trainer.config import MonitorSettings
from trainer.engines.base import LossScale, named_state, set_named_state, squared_norm, update
from trainer.evaluate.base import Job
from trainer.evaluate.features import apply
from trainer.ops.stop import StopHandler, deadline
from trainer.ops.watchdog import Watchdog
from trainer.run import checkpoint
from trainer.run.metrics import Averages, MetricsLogger, peak_memory
from trainer.run.unreadable import UnreadableImages

MOMENTUM = 0.9  # of SGD, in every protocol


class Classifier(nn.Module):
    """Images to logits, by an encoder's backbone and a linear layer, which computes in fp32.

    frozen: the backbone gets no gradient, and is in evaluation mode even where the whole is in training mode, so that
    BatchNorm's running statistics stay as they are, too. The layer starts with weights of N(0, 0.01²), drawn from the
    seed, and bias 0, as in the published protocols.
    """

    def __init__(self, encoder: Encoder, classes: int, *, frozen: bool, seed: int) -> None:
        super().__init__()
        self.backbone, self.frozen = encoder.backbone, frozen
        inner = encoder.head[0]
        assert isinstance(inner, nn.Linear)
        weight_CD = torch.empty(classes, inner.in_features)
        weight_CD.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        self.head = nn.Linear(inner.in_features, classes)
        self.head.load_state_dict({"weight": weight_CD, "bias": torch.zeros(classes)})
        self.head.to(inner.weight.device)
        self.backbone.requires_grad_(not frozen)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x_BD = self.backbone(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            logits_BC: Tensor = self.head(x_BD.float())
        return logits_BC

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


class Recipe(NamedTuple):
    """How `fit` trains. batch_size: of all ranks. lr: of the step after so many others. scale: of the random crops."""

    batch_size: int
    epochs: int
    lr: Callable[[int], float]
    scale: tuple[float, float]
    seed: int
    save_every: int


class Score(NamedTuple):
    """Shares of the test images whose class is the first, or among the first five; how many could be read or not."""

    top1: float
    top5: float
    images: int
    unreadable: int


def fit(
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    train: Source,
    recipe: Recipe,
    job: Job,
    folder: Path,
) -> float:
    """Train by cross-entropy on random crops and flips, from the newest checkpoint in `folder`; seconds it took.

    folder: for what it writes; the file `stop` is looked for in the job's. Each step's batch is the same for any number
    of ranks. Raises `trainer.ops.stop.Stopped` where it was asked to end early, and ValueError where the gradient is
    not finite.
    """
    config, rank_info = job.config, job.rank_info
    data = {
        "views": (View(size=config.eval.size or config.data.views[0].size, scale=recipe.scale),),
        "augment": Augment(jitter=0, gray=0, blur=0),
        "batch_size": recipe.batch_size,
    }
    config = config.model_copy(
        update={"data": config.data.model_copy(update=data), "run": config.run.model_copy(update={"seed": recipe.seed})}
    )
    epoch_steps = steps_per_epoch(len(train), recipe.batch_size)
    steps = epoch_steps * recipe.epochs
    precision = autocast_dtype(config, rank_info.device)
    trained = network.head if network.frozen else network
    scale = LossScale() if precision == torch.float16 and not network.frozen else None
    start = 0
    if saved := checkpoint.newest(folder / "checkpoints"):
        state: dict[str, Any] = {"classifier": trained.state_dict(), **named_state(trained, optimizer, scale)}
        state["step"] = torch.tensor(0)
        checkpoint.load(saved, state)
        set_named_state(trained, optimizer, state)
        start = int(state["step"])
    network.train()
    wrapped: nn.Module = network
    if rank_info.world_size > 1:
        wrapped = DistributedDataParallel(
            network,
            device_ids=[rank_info.device.index] if rank_info.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
    labels_N = torch.from_numpy(train.labels).to(rank_info.device)
    batches = train_batches(
        train, config.data, recipe.seed, rank_info.rank, rank_info.world_size, start, steps, rank_info.device
    )
    saver = checkpoint.Saver(folder / "checkpoints", keep=1)
    unreadable = UnreadableImages(folder, rank_info.rank)
    averages = Averages()
    run, since, seconds = config.run, start, 0.0
    with (
        MetricsLogger(folder, start, steps, MonitorSettings(), active=rank_info.rank == 0) as metrics_logger,
        StopHandler(job.folder, deadline(run.max_minutes, job.started)) as stop,
        Watchdog(folder, rank_info.rank) as watchdog,
    ):
        for step in range(start + 1, steps + 1):
            watchdog.expect(f"step {step}", run.long_timeout if step == start + 1 else run.step_timeout)
            before = time.perf_counter()
            batch = next(batches)
            unreadable.add(batch.unreadable)
            (x_BCHW,) = batch.normalized(rank_info.device)
            labels_B = labels_N[batch.samples.to(rank_info.device, non_blocking=True)]
            with torch.autocast(rank_info.device.type, precision, enabled=precision != torch.float32):
                logits_BC = wrapped(x_BCHW)
            loss = F.cross_entropy(logits_BC.float(), labels_B)
            (loss * scale.value if scale else loss).backward()
            grads = [p.grad for p in trained.parameters() if p.grad is not None]
            norm = math.sqrt(float(squared_norm(grads, rank_info.device))) / (scale.value if scale else 1.0)
            if not math.isfinite(norm) and scale is None:
                raise ValueError(
                    f"step {step}: the gradient is not finite; nothing was updated, checkpoints stay as they are. "
                    "Need a lower learning rate"
                )
            lr = recipe.lr(step - 1)
            update(optimizer, [grads], norm, None, scale, lr)
            averages.add({"loss": loss.detach(), "top1": (logits_BC.argmax(1) == labels_B).float().mean()})
            metrics_logger.advance(step)
            seconds += time.perf_counter() - before
            if step % run.log_every == 0 or step == steps:
                images = step * recipe.batch_size
                row = {"step": step, "epoch": step / epoch_steps, "images": images, **averages.pop(), "lr": lr}
                speed = (step - since) * recipe.batch_size / seconds
                metrics_logger.log({**row, "images_per_second": speed, **peak_memory(rank_info.device)})
                unreadable.check_limit(min((step - start) * recipe.batch_size, len(train)), config.data.max_unreadable)
                since, seconds = step, 0.0
            stopping = stop.should_stop() and step < steps
            watchdog.expect(f"what follows step {step}", run.long_timeout)
            if step % recipe.save_every == 0 or stopping or step == steps:
                state = {"classifier": trained.state_dict(), **named_state(trained, optimizer, scale)}
                saver.start(step, {**state, "step": torch.tensor(step)})
            if stopping:
                saver.wait()
                stop.raise_stopped(step)
        saver.wait()
        return metrics_logger.seconds


def score(network: Classifier, test: Source, classes: list[str], job: Job) -> Score:
    """On the central views of the test images, each seen by one rank. classes: of the training images.

    Raises ValueError, on all ranks, if no image can be read.
    """
    rank_info = job.rank_info
    labels_C = torch.tensor([classes.index(name) for name in test.classes])
    mine = np.arange(rank_info.rank, len(test), rank_info.world_size)
    right = torch.zeros(3, dtype=torch.int64, device=rank_info.device)  # among the first, the first five, all
    for logits_BC, numbers in apply(network, network, test, mine, rank_info.device, job.config):
        labels_B1 = labels_C[torch.from_numpy(test.labels)[numbers]].to(rank_info.device)[:, None]
        hit_B5 = logits_BC.topk(min(5, len(classes))).indices == labels_B1
        right += torch.stack([hit_B5[:, 0].sum(), hit_B5.sum(), torch.tensor(len(numbers), device=rank_info.device)])
    dist.all_reduce(right)
    top1, top5, images = right.tolist()
    if not images:
        raise ValueError(f"data.val: none of {len(test)} images can be read")
    return Score(top1 / images, top5 / images, images, len(test) - images)
