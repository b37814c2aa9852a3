"""One step of a method: the student descends, the bank ascends or the queue takes in keys, the teacher follows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from models.method import Method
from trainer.build import autocast_dtype, build_engine, build_method
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.base import Engine
from trainer.run import checkpoint
from trainer.run.phases import PhaseTimer


class Rates(NamedTuple):
    """What a schedule says for one step: encoder's and bank's learning rate, teacher's momentum."""

    lr: float
    bank_lr: float
    teacher_momentum: float


class NotFinite(ValueError):
    """A loss, on `ranks`, or the gradient is not finite; nothing was updated."""

    def __init__(self, ranks: list[int], norm: float) -> None:
        where = f"the loss on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}, " if ranks else ""
        super().__init__(f"not finite: {where}gradient norm {norm}; nothing was updated")
        self.ranks = ranks


class TrainStep:
    """The game, a method that is played, with what makes its student learn.

    accumulate: parts a batch is cut into. precision: of autocast; torch.float32 for none.
    """

    def __init__(
        self,
        method: Method,
        engine: Engine,
        rank_info: RankInfo,
        accumulate: int = 1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.method, self.engine, self.accumulate, self.precision = method, engine, accumulate, precision
        self.rank_info, self.phases = rank_info, PhaseTimer(rank_info.device)

    def step(self, views: list[Tensor], seed: int, rates: Rates) -> dict[str, Tensor]:
        """views: V normalised images [B, 3, S_v, S_v] on the device. Gives this rank's metrics.

        Everything random in the networks is a function of `seed`, the same on all ranks, and the rank.
        Raises NotFinite, on all ranks and before anything is updated, where the loss or the gradient is not finite;
        in fp16 a gradient that overflows makes the student miss this step instead.
        """
        torch.manual_seed(seed + self.rank_info.rank)
        updates: list[Sequence[Any]] = []
        total: dict[str, Tensor] = {}
        for part, part_views in enumerate(zip(*(view.chunk(self.accumulate) for view in views), strict=True)):
            with self.engine.micro_batch(last=part == self.accumulate - 1):
                with torch.autocast(
                    self.rank_info.device.type, self.precision, enabled=self.precision != torch.float32
                ):
                    output = self.method.forward_step(self.engine.student, list(part_views), seed + part, self.phases)
                with self.phases("backward"):
                    self.engine.backward(output.loss / self.accumulate)
            updates.append(output.negatives_update)
            for name, value in output.metrics.items():
                total[name] = total[name] + value / self.accumulate if part else value / self.accumulate
        with self.phases("optimizer"):
            scale = self.engine.scale.value if self.engine.scale else None
            norm = self.engine.step(rates.lr)
            if not math.isfinite(norm):
                self._refuse(total["loss"], norm)
        total["grad_norm"] = self._scalar(norm if math.isfinite(norm) else 0.0)
        if scale is not None:
            total["loss_scale"] = self._scalar(scale)
            total["skipped"] = self._scalar(float(not math.isfinite(norm)))
        with self.phases("adversary"):  # before the teacher moves, from the queries of this step
            self.method.update_negatives(updates, rates.bank_lr, seed)
        with self.phases("ema"):
            self.engine.update_teacher(rates.teacher_momentum)
        return total

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self.rank_info.device)  # no copy from the host, as torch.tensor makes

    def _refuse(self, loss: Tensor, norm: float) -> None:
        """Raise NotFinite unless a smaller loss scale can mend it, which it cannot where a loss is not finite."""
        ranks = [torch.zeros((), device=self.rank_info.device) for _ in range(self.rank_info.world_size)]
        dist.all_gather(ranks, (~loss.isfinite()).float())
        bad = [rank for rank, flag in enumerate(ranks) if flag]
        if self.engine.scale is None or bad:
            raise NotFinite(bad, norm)

    def state(self, step: int) -> dict[str, Any]:
        """All tensors that a run after `step` steps goes on from, by names that no engine changes."""
        return {**self.engine.state(), **self.method.state_dict(), "step": torch.tensor(step)}

    def load(self, path: Path) -> int:
        """Go on from a checkpoint; returns its step. Called by all ranks."""
        state = self.state(0)
        checkpoint.load(path, state)
        self.engine.load(state)
        self.method.loaded()
        return int(state["step"])


def build_train_step(config: Config, rank_info: RankInfo) -> TrainStep:
    """What a configuration describes, on these ranks; learned negatives are not filled yet."""
    method = build_method(config, rank_info)
    engine = build_engine(method, config, rank_info)
    return TrainStep(method, engine, rank_info, config.optim.accumulate, autocast_dtype(config, rank_info.device))
