"""One step of the game: the student descends, the bank ascends, the teacher follows."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from kernels import AdversaryStats
from models.adco import AdCo
from models.bank import Rows
from trainer import checkpoint
from trainer.build import weights
from trainer.distributed import Place


class Rates(NamedTuple):
    """What a schedule says for one step: encoder's and bank's learning rate, teacher's momentum."""

    lr: float
    bank_lr: float
    teacher_momentum: float


class Learner:
    """The game with what makes its student learn.

    accumulate: parts a batch is cut into. precision: torch.bfloat16 for autocast, torch.float32 for none.
    """

    def __init__(
        self,
        game: AdCo,
        optimizer: torch.optim.Optimizer,
        place: Place,
        accumulate: int = 1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.game, self.optimizer, self.accumulate, self.precision = game, optimizer, accumulate, precision
        self.place = place
        self.student: Callable[[list[Tensor]], Tensor] = game.student
        if place.world > 1:
            self.student = DistributedDataParallel(
                game.student,
                device_ids=[place.device.index] if place.device.type == "cuda" else None,
                broadcast_buffers=False,  # BatchNorm's running statistics are averaged when they are needed
                gradient_as_bucket_view=True,
            )

    def step(self, views: list[Tensor], seed: int, rates: Rates) -> tuple[dict[str, Tensor], AdversaryStats]:
        """views: V normalised images [B, 3, S_v, S_v] on the device. Gives this rank's metrics and shard's statistics.

        Everything random in the networks is a function of `seed`, the same on all ranks, and the rank.
        """
        torch.manual_seed(seed + self.place.rank)
        rows: list[Rows] = []
        total: dict[str, Tensor] = {}
        for part, part_views in enumerate(zip(*(view.chunk(self.accumulate) for view in views), strict=True)):
            last = part == self.accumulate - 1
            wait = nullcontext()
            if isinstance(self.student, DistributedDataParallel) and not last:
                wait = self.student.no_sync()  # type: ignore[assignment]
            with wait:
                with torch.autocast(self.place.device.type, self.precision, enabled=self.precision != torch.float32):
                    play = self.game.play(self.student, list(part_views), seed + part)
                with record_function("backward"):
                    (play.loss / self.accumulate).backward()
            rows += [Rows(r.q_ND, r.coef_N / self.accumulate) for r in play.rows]
            for name, value in play.metrics.items():
                total[name] = total[name] + value / self.accumulate if part else value / self.accumulate
        with record_function("adversary"):  # before the teacher moves, from the queries of this step
            stats = self.game.bank.step(rows, rates.bank_lr, seed)
        with record_function("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = rates.lr
            self.optimizer.step()
            self.optimizer.zero_grad()
        with record_function("ema"):
            self.game.follow(rates.teacher_momentum)
        return total, stats

    def state(self, step: int) -> dict[str, Any]:
        """All tensors that a run after `step` steps goes on from; they share memory with the learner."""
        return {**weights(self.game), "optimizer": self._optimizer_state()["state"], "step": torch.tensor(step)}

    def load(self, path: Path) -> int:
        """Go on from a checkpoint; returns its step. Called by all ranks."""
        optimizer_state = self._optimizer_state()
        state = {**weights(self.game), "optimizer": optimizer_state["state"], "step": torch.tensor(0)}
        checkpoint.load(path, state)
        set_optimizer_state_dict(self.game.student, self.optimizer, optimizer_state)
        self.game.bank.loaded()
        return int(state["step"])

    def _optimizer_state(self) -> dict[str, Any]:
        """By parameter name; makes the state if there was no step yet."""
        return get_optimizer_state_dict(self.game.student, self.optimizer)
