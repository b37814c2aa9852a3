"""The contract of a method: what learns, what follows it, what is remembered, and what a step gives.

A method is one file with two classes: `Settings`, the keys of the configuration's section `method`, and a subclass of
`Method` with the loss of queries and keys, and what happens after the update. docs/methods.md shows one by example.

B images of this rank, V views, N = B times the number of query views, D dimensions.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.profiler import record_function

from kernels import AdversaryStats, check_temperature
from models.batchnorm import plan, shuffle, unshuffle
from models.collapse import spread
from models.encoder import Encoder
from models.negatives.bank import Bank, BankUpdate
from models.negatives.queue import Queue
from models.teacher import make_teacher

Phase = Callable[[str], AbstractContextManager[object]]  # what surrounds a phase of a step, by its name
Views = dict[int, Tensor]  # embeddings, unit rows [B, D] in fp32, by number of view


class Settings(BaseModel):
    """What every method has.

    teacher_momentum: from the first step on; along half a cosine to teacher_momentum_final, constant if None.
    bn: shuffle moves images between ranks for the teacher (MoCo, sec. 3.3); sync normalises over all ranks; local.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    teacher_momentum: float = Field(0.999, ge=0, le=1)
    teacher_momentum_final: float | None = Field(None, ge=0, le=1)
    bn: Literal["shuffle", "sync", "local"] = "shuffle"

    @property
    def negatives(self) -> Literal["bank", "queue", "none"]:
        """What the configuration's section `bank` is of: learned negatives, a queue of keys, or nothing."""
        return "none"

    @property
    def key_views(self) -> tuple[int, ...]:
        """Numbers of the views that the teacher makes keys of; without any there is no teacher."""
        return (0, 1)

    def query_views(self, views: int) -> list[int]:
        """Numbers of the views that the student sees: the others, or all if there are several key views."""
        return [i for i in range(views) if self.key_views != (i,)]

    def check(self, batch_size: int, views: int, negatives: int, bank_temperature: float) -> None:
        """Raise ValueError where these settings do not fit the batch of all ranks, the views or the bank."""

    def make(self, student: Encoder, negatives: Bank | Queue | None, kernels: str) -> "Method":
        """The method around a student. negatives: as `negatives` asks for. kernels: their implementation."""
        raise NotImplementedError


class StepOutput(NamedTuple):
    """What a method makes of one part of a batch.

    loss: scalar, of this rank's images, to be averaged over ranks. metrics: name to scalar tensor, of this rank.
    left: what `Method.after` is to be given: `Rows` for a bank, keys [B, D] for a queue.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    negatives_update: Sequence[Any] = ()


class Method:
    """`student` learns by gradient, `teacher` follows it by moving average, bank or queue step in `after`.

    Adding a method is overriding `loss`; one that remembers something else overrides `after` and `state_dict`, too.
    """

    def __init__(self, student: Encoder, settings: Settings, negatives: Bank | Queue | None = None) -> None:
        self.student, self.bn = student, settings.bn
        self.key_views, self.query_views = settings.key_views, settings.query_views
        self.teacher = make_teacher(student) if self.key_views else None
        self.bank = negatives if isinstance(negatives, Bank) else None
        self.queue = negatives if isinstance(negatives, Queue) else None
        self.stats: AdversaryStats | None = None  # of the bank's last step
        self.queries_ND: Tensor | None = None  # of the last part of a batch

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """The loss of this rank's queries, with gradient, and keys, without. Called by all ranks, in fp32."""
        raise NotImplementedError

    def update_negatives(self, updates: Sequence[Sequence[Any]], bank_lr: float, seed: int) -> None:
        """The step of what is neither student nor teacher, after the student's and before the teacher's.

        left: of each part of the batch. seed: of what is random, the same on all ranks.
        """
        if self.bank:
            rows = [BankUpdate(r.q_ND, r.coef_N / len(updates)) for update in updates for r in update]
            self.stats = self.bank.step(rows, bank_lr, seed)
        if self.queue:
            self.queue.put([k_BD for update in updates for k_BD in update])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds beside the networks: name to tensors, which share memory with the method."""
        bank = {"bank": self.bank.state_dict()} if self.bank else {}
        return {**bank, **({"queue": self.queue.state_dict()} if self.queue else {})}

    def loaded(self) -> None:
        """To be called when the tensors of `state_dict` were written."""
        if self.bank:
            self.bank.loaded()

    def metrics(self) -> dict[str, float]:
        """For the log, of the last step; waits for the device. Called by all ranks."""
        assert self.queries_ND is not None
        return spread(self.queries_ND) | (self.bank.metrics(self.stats) if self.bank and self.stats else {})

    def forward_step(
        self,
        student: Callable[[list[Tensor]], Tensor],
        views: list[Tensor],
        seed: int,
        phase: Phase = record_function,
    ) -> StepOutput:
        """Loss and metrics of one part of a batch: V images tensors [B, 3, S_v, S_v].

        student: what to call for queries, `self.student` or a wrapper that averages gradients over ranks.
        seed: of the shuffle, the same on all ranks. phase: what times the phases teacher, student and score.
        """
        with phase("teacher"):
            keys = {j: self.keys(views[j], seed + j) for j in self.key_views}
        query_views = self.query_views(len(views))
        with phase("student"):
            queries_ND = student([views[i] for i in query_views])
        self.queries_ND = queries_ND.detach()
        with phase("score"), torch.autocast(queries_ND.device.type, enabled=False):
            return self.loss(dict(zip(query_views, queries_ND.chunk(len(query_views)), strict=True)), keys)

    @torch.no_grad()
    def keys(self, images: Tensor, seed: int) -> Tensor:
        """The teacher's embeddings of images [B, 3, S, S], unit rows [B, D]."""
        assert self.teacher is not None
        world_size = dist.get_world_size()
        if self.bn != "shuffle" or world_size == 1:
            return self.teacher([images])
        route = plan(len(images), dist.get_rank(), world_size, seed)
        return unshuffle(self.teacher([shuffle(images, route)]), route)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Make BatchNorm's running statistics, which each rank keeps of its own batches, the mean of all ranks'.

        Where and how often this is done changes no result: it commutes with the moving averages.
        """
        world_size = dist.get_world_size()
        for network in filter(None, (self.student, self.teacher)):
            for buffer in network.buffers():
                if world_size > 1 and buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= world_size


def queries_for_key(queries: Views, j: int) -> Tensor:
    """The queries of all views that key view j is held against, one view after the other: query i has key i mod B."""
    return torch.cat([q_BD for i, q_BD in queries.items() if i != j])


def similarities(loss: Tensor, positive_N: Tensor, hardest_N: Tensor) -> dict[str, Tensor]:
    """Metrics of a contrastive loss: similarity of each query to its own key and to its hardest negative."""
    return {
        "loss": loss.detach(),
        "pretext_top1": (positive_N > hardest_N).float().mean(),
        "positive_similarity": positive_N.mean(),
        "hardest_similarity": hardest_N.mean(),
    }


def check(name: str, temperature: float, columns: int) -> None:
    """Raise ValueError, naming the key, where a sum over so many columns overflows."""
    try:
        check_temperature(temperature, columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_queue(size: int, keys: int) -> None:
    """Raise ValueError where a step's keys would not fit the queue."""
    if size < keys:
        raise ValueError(f"bank.size: a queue of {size} is shorter than the {keys} keys of a step")
