"""Training of a classifier with the loop of pre-training, for linear evaluation and fine-tuning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.batch import Batch
from data.loader import train_batches
from data.order import steps_per_epoch
from data.random import NETWORK, hash_counters
from data.sources.base import Source
from data.views import View
from models.compat import DDP_LOCAL_BUFFERS
from trainer import loop
from trainer.build import autocast_dtype
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.base import named_state, set_named_state, squared_norm, update
from trainer.engines.finite import FiniteCheck, LossScale, NotFinite, StepResult, not_finite
from trainer.evaluate.base import EvaluationContext
from trainer.evaluate.features import image_size
from trainer.evaluate.probe import CROPS_AND_FLIPS, Classifier
from trainer.loop import LoopSettings
from trainer.run import checkpoint
from trainer.run.phases import PhaseTimer
from trainer.run.results import Row


class Recipe(NamedTuple):
    """The hyperparameters with which `fit` trains a classifier.

    Attributes:
        batch_size: Images per step over all ranks.
        epochs: Number of epochs.
        lr: Returns the learning rate of the step after a number of steps.
        scale: Area of the random crops, as a share of the image's area.
        seed: Seed of the order, the crops, dropout and stochastic depth.
        save_every: Steps between checkpoints.
    """

    batch_size: int
    epochs: int
    lr: Callable[[int], float]
    scale: tuple[float, float]
    seed: int
    save_every: int


class ClassifierTraining:
    """The training of a classifier by cross-entropy on random crops and flips, as `trainer.loop.Task`."""

    def __init__(
        self,
        network: Classifier,
        optimizer: torch.optim.Optimizer,
        labels: NDArray[np.int64],
        lr: Callable[[int], float],
        seed: int,
        config: Config,
        rank_info: RankInfo,
    ) -> None:
        """Prepare the training of `network`.

        Args:
            network: The classifier; only its head is trained if it is frozen.
            optimizer: Over the trained parameters.
            labels: Class of each training image, int64 [number of images].
            lr: Returns the learning rate of the step after a number of steps.
            seed: Seed of dropout and stochastic depth, together with step and rank.
            config: Gives the precision.
            rank_info: This process among all ranks.
        """
        self.network, self.optimizer, self.lr, self.seed, self.rank_info = network, optimizer, lr, seed, rank_info
        self.device, self.precision = rank_info.device, autocast_dtype(config, rank_info.device)
        self.trained: nn.Module = network.head if network.frozen else network
        self.scale = LossScale(self.device) if self.precision == torch.float16 and not network.frozen else None
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
                **DDP_LOCAL_BUFFERS,
                gradient_as_bucket_view=True,
                static_graph=True,  # which knows the parameters without gradient
            )

    def step(self, batch: Batch, step: int) -> StepResult:
        """See `trainer.loop.Task.step`."""
        torch.manual_seed(int(hash_counters(self.seed, NETWORK, step)[0] >> np.uint64(2)) + self.rank_info.rank)
        with self.phases("normalize"):
            (x_BCHW,) = batch.normalized(self.device, self.precision)
            labels_B = self.labels_N[batch.samples.to(self.device, non_blocking=True)]
        with (
            self.phases("forward"),
            torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32),
        ):
            logits_BC = self.wrapped(x_BCHW)
        loss = F.cross_entropy(logits_BC.float(), labels_B)
        with self.phases("backward"):
            (loss * self.scale.value if self.scale else loss).backward()
        with self.phases("optimizer"):
            grads = [p.grad for p in self.trained.parameters() if p.grad is not None]
            norm = squared_norm(grads, self.device).sqrt()
            norm = norm / self.scale.value if self.scale else norm
            update(self.optimizer, norm, None, self.scale, self.lr(step - 1))
            failed = not_finite(norm)
            if self.scale:  # which a smaller scale may cure
                self.scale.update(failed)
                failed = torch.zeros_like(failed)
            check = FiniteCheck(torch.stack([norm, failed.float(), torch.zeros_like(norm)]))
        metrics = {"loss": loss.detach(), "top1": (logits_BC.argmax(1) == labels_B).float().mean()}
        return StepResult(metrics, check)

    def log_values(self, step: int, averages: dict[str, float]) -> dict[str, float]:
        """See `trainer.loop.Task.log_values`."""
        return {"lr": self.lr(step - 1)}

    def describe_failure(self, error: NotFinite, batch: Batch, step: int) -> str:
        """See `trainer.loop.Task.describe_failure`."""
        return "use a lower learning rate"

    def state(self, step: int) -> dict[str, Any]:
        """See `trainer.loop.Task.state`."""
        state = {"classifier": self.trained.state_dict(), **named_state(self.trained, self.optimizer, self.scale)}
        return {**state, "step": torch.tensor(step)}

    def evaluate(self, step: int) -> Row:
        """Never called: the classifier is evaluated once, after its training."""
        raise AssertionError


def fit(
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    train: Source,
    recipe: Recipe,
    context: EvaluationContext,
    folder: Path,
) -> float:
    """Train a classifier by cross-entropy on random crops and flips. Collective.

    Training continues from the newest checkpoint in `folder`. The batches are the same for any number of ranks.

    Args:
        network: The classifier.
        optimizer: Over the trained parameters.
        train: The labelled images.
        recipe: How to train.
        context: The evaluation. A file `stop` in its folder ends training.
        folder: Receives checkpoints and metrics.

    Returns:
        Seconds of training, over all starts.

    Raises:
        trainer.ops.stop.Stopped: The user, SLURM or a time limit asked for an early end.
        ValueError: The gradient is not finite.
    """
    config, rank_info = context.config, context.rank_info
    view = View(size=image_size(config), scale=recipe.scale)
    data = config.data.model_copy(
        update={
            "views": (view,),
            "augment": CROPS_AND_FLIPS,
            "batch_size": recipe.batch_size,
            "backend": config.data.evaluation_backend_for(rank_info.device),
        }
    )
    epoch_steps = steps_per_epoch(len(train), recipe.batch_size)
    settings = LoopSettings(
        run_folder=context.folder.parent,
        folder=folder,
        stop_folder=context.folder,
        process_start=context.started,
        steps=epoch_steps * recipe.epochs,
        steps_per_epoch=epoch_steps,
        batch_size=recipe.batch_size,
        num_images=len(train),
        max_unreadable=data.max_unreadable,
        save_every=recipe.save_every,
        keep=1,
        keep_every=0,
        evaluate_every=None,
        run=config.run.model_copy(update={"profile": 0}),
        trackers=config.monitor,
    )
    task = ClassifierTraining(network, optimizer, train.labels, recipe.lr, recipe.seed, config, rank_info)
    saved = checkpoint.newest(folder / "checkpoints")
    start = task.load(saved) if saved else 0
    task.start()
    batches = train_batches(
        train, data, recipe.seed, rank_info.rank, rank_info.world_size, start, settings.steps, rank_info.device
    )
    return loop.train(task, batches, start, settings, rank_info)
