"""One training step: the student's gradient step, the update of the negatives, and the teacher's moving average."""

import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.normalize import normalize
from data.references import is_reference
from models.encoder import Encoder
from models.method import Method
from trainer.build import autocast_dtype, build_method
from trainer.config import Config
from trainer.cuda_graph import DeviceInputs, StepGraph, reason_against
from trainer.distributed import RankInfo
from trainer.engines import ddp
from trainer.engines.base import Engine, EngineInputs
from trainer.engines.finite import FiniteCheck, RunningStatistics, StepResult, not_finite
from trainer.run import checkpoint
from trainer.run.phases import PhaseTimer

log = logging.getLogger(__name__)


class Rates(NamedTuple):
    """The scheduled values of one step.

    Attributes:
        lr: Learning rate of the encoder.
        bank_lr: Learning rate of the bank.
        teacher_momentum: Momentum of the teacher's moving average.
        backbone_lr: Learning rate of the encoder's backbone; None if it is `lr`.
    """

    lr: float
    bank_lr: float
    teacher_momentum: float
    backbone_lr: float | None = None


def network_input(images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 images to `dtype`, see `data.normalize.normalize`; floats are normalised already and stay."""
    return images if images.is_floating_point() else normalize(images, device, dtype)


class StepSeeds:
    """Seeds torch's generators before a step, unless the first step shows that nothing draws from them.

    Dropout and stochastic depth draw in every step or in none. A backbone from outside may begin later.
    """

    def __init__(self, device: torch.device, always: bool) -> None:
        """Prepare the seeds of a training on `device`; `always` seeds every step."""
        self.device = device
        self.draws = True if always else None  # None: not known before the second step
        self.before: list[Tensor] = []  # the generators' states before the first step

    def seed(self, seed: int) -> None:
        """Seed the generators before a step."""
        if self.draws is None and self.before:
            self.draws = not all(map(torch.equal, self.before, self._states()))
        if self.draws is not False:
            torch.manual_seed(seed)
        if self.draws is None:
            self.before = self._states()

    def _states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


class TrainStep:
    """A method with the engine that trains its student.

    Attributes:
        method: Student, teacher, negatives and loss.
        engine: Distributes and updates student and teacher.
        accumulate: Number of micro-batches (gradient-accumulation steps) per step.
        precision: Type of autocast; torch.float32 for none.
        normalize: Makes the networks' input in the type of autocast, to which the first convolution would cast it.
        num_parameters: Parameters of the whole student.
        phases: Measures the phases of the step.
    """

    def __init__(self, config: Config, rank_info: RankInfo, student: Encoder | None = None) -> None:
        """Builds what the configuration describes. Called by all ranks.

        Args:
            config: The configuration.
            rank_info: This process among all ranks.
            student: Start from these weights; None for a fresh encoder.

        Raises:
            ValueError: The configuration does not fit the number of ranks, the device or the backbone.
        """
        self.method: Method = build_method(config, rank_info, student)
        self.num_parameters = sum(p.numel() for p in self.method.student.parameters())  # before an engine shards them
        self.accumulate, self.precision = config.optim.accumulate, autocast_dtype(config, rank_info.device)
        networks = self.method.student, self.method.teacher
        self.rank_info, self.phases = rank_info, PhaseTimer(rank_info.device)
        self.graph = self._make_graph(config)
        with self.graph.on_stream() if self.graph else nullcontext():
            self.engine: Engine = config.engine.build(
                EngineInputs(*networks, config.optim, config.data.batch_size, rank_info, self.precision)
            )
        self.normalize = functools.partial(network_input, device=rank_info.device, dtype=self.precision)
        self.seeds = StepSeeds(rank_info.device, always=is_reference(config.model.backbone))
        local = rank_info.world_size > 1 and config.method.bn != "sync"
        self.statistics = RunningStatistics(*networks, local)
        self.inputs = DeviceInputs(rank_info.device)
        self.metric_names: list[str] = []
        # NaN after a failed step, until `load`: as a factor of the loss it makes all later steps fail, too.
        self.intact = torch.ones((), device=rank_info.device)

    def step(self, views: list[Tensor], seed: int, rates: Rates) -> StepResult:
        """Train on one batch of this rank, without waiting for the device.

        If the loss of any rank or the gradient is not finite, the step fails: parameters, optimizer, running
        statistics, negatives, teacher and loss scale keep their values to the bit, in this step and in all later ones.
        In fp16, a gradient that overflows while all losses are finite only skips the student's update.

        Args:
            views: V image tensors on the device: uint8 [B, S_v, S_v, 3], or normalised [B, 3, S_v, S_v].
            seed: Source of all random numbers in the networks, together with the rank; equal on all ranks.
            rates: Learning rates and momentum of this step.

        Returns:
            Metrics, and whether the step failed.
        """
        self.seeds.seed(seed + self.rank_info.rank)
        batch = len(views[0]) // self.accumulate
        orders = [order_B for i in range(self.accumulate) for order_B in self.method.draw_orders(batch, seed + i)]
        inputs, backbone_lr = self.inputs, rates.backbone_lr
        inputs.fill(seed, rates.lr, backbone_lr or 0.0, rates.bank_lr, rates.teacher_momentum, orders)
        compute = functools.partial(self._compute, lr=rates.lr, backbone_lr=backbone_lr)
        if self.engine.rates_on_device:
            own_lr = None if backbone_lr is None else inputs.backbone_lr
            compute = functools.partial(self._compute, lr=inputs.lr, backbone_lr=own_lr)
        values = self.graph(compute, views) if self.graph else compute(views)
        return StepResult(dict(zip(self.metric_names, values[3:].unbind(), strict=True)), FiniteCheck(values[:3]))

    def _compute(self, views: list[Tensor], lr: float | Tensor, backbone_lr: float | Tensor | None) -> Tensor:
        """Compute the step on the device, from `inputs` and memory that the device has already.

        Returns:
            The values of `FiniteCheck`, and the metrics, whose names are in `metric_names`.
        """
        self.statistics.save()
        shuffles = len(self.inputs.orders) // self.accumulate
        factors: list[Tensor] = []
        updates: list[Sequence[Any]] = []
        metrics: dict[str, Tensor] = {}
        micro_batches = zip(*(view.chunk(self.accumulate) for view in views), strict=True)
        for i, micro_batch in enumerate(micro_batches):
            orders = self.inputs.orders[i * shuffles : (i + 1) * shuffles]
            with self.engine.micro_batch(last=i == self.accumulate - 1):
                with torch.autocast(
                    self.rank_info.device.type, self.precision, enabled=self.precision != torch.float32
                ):
                    output = self.method.forward_step(
                        self.engine.student, list(micro_batch), orders, self.phases, self.normalize
                    )
                loss = output.loss.detach()
                with self.phases("backward"):
                    # NaN unless the loss is finite: then all gradients are NaN, on all ranks.
                    factor = torch.sub(loss, loss).add_(self.intact).div_(self.accumulate)
                    self.engine.backward(output.loss * factor)
            factors.append(factor)
            updates.append(output.negatives_update)
            for name, value in output.metrics.items():
                metrics[name] = metrics[name] + value / self.accumulate if i else value / self.accumulate
        with self.phases("optimizer"):
            self.statistics.average()
            norm = self.engine.step(lr, backbone_lr)
            overflow = not_finite(norm)
            own_failed = not_finite(functools.reduce(torch.add, factors))
            failed = self._failed(overflow, own_failed)
            self.intact.copy_(torch.where(failed, torch.nan, 1.0))
            self.statistics.finish(failed)
            metrics["grad_norm"] = torch.where(overflow, 0.0, norm)
            if scale := self.engine.scale:
                metrics["loss_scale"], metrics["skipped"] = scale.value.clone(), overflow.float()
                scale.update(overflow, failed)
        with self.phases("adversary"):  # uses the queries of this step, so it comes before the teacher's update
            self.method.update_negatives(updates, self.inputs.bank_lr, self.inputs.seed, failed)
        with self.phases("ema"):
            self.engine.update_teacher(self.inputs.teacher_momentum, failed)
        self.metric_names = list(metrics)
        return torch.stack([norm, failed.to(norm), own_failed.to(norm), *metrics.values()])

    def state(self, step: int) -> dict[str, Any]:
        """Return all tensors that a run continues from after `step` steps, under names that no engine changes."""
        return {**self.engine.state(), **self.method.state_dict(), "step": torch.tensor(step)}

    def load(self, path: Path) -> int:
        """Load a checkpoint and return its step. Called by all ranks."""
        state = self.state(0)
        checkpoint.load(path, state)
        self.engine.load(state)
        self.method.loaded()
        self.intact.fill_(1.0)
        if self.graph:
            self.graph.reset()
        return int(state["step"])

    def _make_graph(self, config: Config) -> StepGraph | None:
        """Return the graph that the configuration asks for; None, with a line in the log, if it is impossible."""
        if not (isinstance(config.engine, ddp.Settings) and config.engine.cuda_graph):
            return None
        if reason := reason_against(config, self.rank_info.device):
            if self.rank_info.rank == 0:
                log.warning("engine.cuda_graph: %s; training goes on without a graph", reason)
            return None
        return StepGraph(self.rank_info.device, self.phases, self._discard)

    def _discard(self) -> None:
        assert isinstance(self.engine, ddp.DDP)
        self.engine.discard()
        self.statistics.works.clear()

    def _failed(self, overflow: Tensor, own_failed: Tensor) -> Tensor:
        """Return whether the step failed, bool scalar, equal on all ranks.

        Args:
            overflow: Whether the gradient is not finite, which a smaller loss scale may cure in fp16.
            own_failed: Whether the loss of this rank is not finite, which nothing cures.
        """
        if self.engine.scale is None:
            return overflow
        ranks = own_failed.float()
        dist.all_reduce(ranks)
        return ranks > 0
