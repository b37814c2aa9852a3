"""A linear classifier on a backbone: its training, with the backbone frozen or not, and its accuracy.

B images of a rank's batch, D features, C classes.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.batch import Batch
from data.loader import train_batches
from data.order import steps_per_epoch
from data.sources.base import Source
from data.views import Augment, View
from models.encoder import Encoder
from trainer import loop
from trainer.build import autocast_dtype
from trainer.config import Config, MonitorSettings
from trainer.distributed import RankInfo
from trainer.engines.base import LossScale, NotFinite, named_state, set_named_state, squared_norm, update
from trainer.evaluate.base import EvaluationContext
from trainer.evaluate.features import forward_images
from trainer.loop import LoopSettings
from trainer.run import checkpoint
from trainer.run.phases import PhaseTimer
from trainer.run.results import Row

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


class ClassifierTraining:
    """The training of a classifier by cross-entropy on random crops and flips, as `trainer.loop.Task`."""

    def __init__(
        self,
        network: Classifier,
        optimizer: torch.optim.Optimizer,
        labels: NDArray[np.int64],
        lr: Callable[[int], float],
        config: Config,
        rank_info: RankInfo,
    ) -> None:
        """Prepares the training of `network`.

        Args:
            network: The classifier; only its head is trained if it is frozen.
            optimizer: Over the trained parameters.
            labels: Class of each training image, int64 [number of images].
            lr: Learning rate of the step that follows so many others.
            config: Precision and device.
            rank_info: This process among all ranks.
        """
        self.network, self.optimizer, self.lr, self.rank_info = network, optimizer, lr, rank_info
        self.device, self.precision = rank_info.device, autocast_dtype(config, rank_info.device)
        self.trained: nn.Module = network.head if network.frozen else network
        self.scale = LossScale() if self.precision == torch.float16 and not network.frozen else None
        self.labels_N = torch.from_numpy(labels).to(self.device)
        self.phases, self.flops = PhaseTimer(self.device), 0.0
        self.wrapped: nn.Module = network

    def load(self, path: Path) -> int:
        """Load a checkpoint and return its step."""
        state = self.state(0)
        checkpoint.load(path, state)
        set_named_state(self.trained, self.optimizer, state)
        return int(state["step"])

    def start(self) -> None:
        """Put the network into training mode; with several ranks, average its gradients from now on."""
        self.network.train()
        if self.rank_info.world_size > 1:
            self.wrapped = DistributedDataParallel(
                self.network,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """See `trainer.loop.Task.step`."""
        with self.phases("normalize"):
            (x_BCHW,) = batch.normalized(self.device)
            labels_B = self.labels_N[batch.samples.to(self.device, non_blocking=True)]
        with (
            self.phases("forward"),
            torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32),
        ):
            logits_BC = self.wrapped(x_BCHW)
        loss = F.cross_entropy(logits_BC.float(), labels_B)
        scale = self.scale.value if self.scale else 1.0
        with self.phases("backward"):
            (loss * scale).backward()
        with self.phases("optimizer"):
            grads = [p.grad for p in self.trained.parameters() if p.grad is not None]
            norm = math.sqrt(float(squared_norm(grads, self.device))) / scale
            if not math.isfinite(norm) and self.scale is None:
                raise NotFinite([], norm)
            update(self.optimizer, [grads], norm, None, self.scale, self.lr(step - 1))
        return {"loss": loss.detach(), "top1": (logits_BC.argmax(1) == labels_B).float().mean()}

    def log_values(self, step: int) -> dict[str, float]:
        """See `trainer.loop.Task.log_values`."""
        return {"lr": self.lr(step - 1)}

    def describe_failure(self, error: NotFinite, batch: Batch, step: int) -> str:
        """See `trainer.loop.Task.describe_failure`."""
        return "use a lower learning rate"

    def state(self, step: int) -> dict[str, Any]:
        """See `trainer.loop.Task.state`."""
        state = {"classifier": self.trained.state_dict(), **named_state(self.trained, self.optimizer, self.scale)}
        return {**state, "step": torch.tensor(step)}

    def evaluate(self) -> Row:
        """Is never called: the classifier is evaluated once, after training."""
        raise AssertionError


def fit(
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    train: Source,
    recipe: Recipe,
    context: EvaluationContext,
    folder: Path,
) -> float:
    """Train a classifier from the newest checkpoint in `folder`, or from the start. Called by all ranks.

    Args:
        network: The classifier.
        optimizer: Over the trained parameters.
        train: The labelled images.
        recipe: How to train.
        context: The evaluation that this training is a part of; the file `stop` is looked for in its folder.
        folder: Receives checkpoints and metrics.

    Returns:
        Seconds that training took, over all starts. Each step's batch is the same for any number of ranks.

    Raises:
        trainer.ops.stop.Stopped: The user, SLURM or a time limit asked for an early end.
        ValueError: The gradient is not finite.
    """
    config = context.config
    view = View(size=config.eval.size or config.data.views[0].size, scale=recipe.scale)
    data = {"views": (view,), "augment": Augment(jitter=0, gray=0, blur=0), "batch_size": recipe.batch_size}
    config = config.model_copy(
        update={"data": config.data.model_copy(update=data), "run": config.run.model_copy(update={"seed": recipe.seed})}
    )
    epoch = steps_per_epoch(len(train), recipe.batch_size)
    settings = LoopSettings(
        folder=folder,
        stop_folder=context.folder,
        process_start=context.started,
        steps=epoch * recipe.epochs,
        steps_per_epoch=epoch,
        batch_size=recipe.batch_size,
        num_images=len(train),
        max_unreadable=config.data.max_unreadable,
        save_every=recipe.save_every,
        keep=1,
        keep_every=0,
        evaluate_every=None,
        run=config.run.model_copy(update={"profile": 0}),
        trackers=MonitorSettings(),
    )
    task = ClassifierTraining(network, optimizer, train.labels, recipe.lr, config, context.rank_info)
    saved = checkpoint.newest(folder / "checkpoints")
    start = task.load(saved) if saved else 0
    task.start()
    rank_info = context.rank_info
    batches = train_batches(
        train, config.data, recipe.seed, rank_info.rank, rank_info.world_size, start, settings.steps, rank_info.device
    )
    return loop.train(task, batches, start, settings, context.rank_info)


def score(network: Classifier, test: Source, classes: list[str], context: EvaluationContext) -> Score:
    """On the central views of the test images, each seen by one rank. classes: of the training images.

    Raises ValueError, on all ranks, if no image can be read.
    """
    rank_info = context.rank_info
    labels_C = torch.tensor([classes.index(name) for name in test.classes])
    mine = np.arange(rank_info.rank, len(test), rank_info.world_size)
    right = torch.zeros(3, dtype=torch.int64, device=rank_info.device)  # among the first, the first five, all
    for logits_BC, numbers in forward_images(network, network, test, mine, rank_info.device, context.config):
        labels_B1 = labels_C[torch.from_numpy(test.labels)[numbers]].to(rank_info.device)[:, None]
        hit_B5 = logits_BC.topk(min(5, len(classes))).indices == labels_B1
        right += torch.stack([hit_B5[:, 0].sum(), hit_B5.sum(), torch.tensor(len(numbers), device=rank_info.device)])
    dist.all_reduce(right)
    top1, top5, images = right.tolist()
    if not images:
        raise ValueError(f"data.val: none of {len(test)} images can be read")
    return Score(top1 / images, top5 / images, images, len(test) - images)
