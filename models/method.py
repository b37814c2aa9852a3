"""The base classes of a method: its settings, its state and one training step.

A method is one file with two classes: `Settings`, the keys of the configuration's section `method`, and a subclass of
`Method` with the loss. docs/methods.md shows an example.

Shape suffixes: B images of this rank, V views, N = B times the number of query views, D dimensions.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

import kernels
from models.encoder import Encoder
from models.health import embedding_spread
from models.negatives.base import BankSettings, Negatives
from models.shuffle import draw_order, make_shuffle, shuffle, unshuffle
from models.teacher import make_teacher

Phase = Callable[[str], AbstractContextManager[object]]  # surrounds a phase of a step, given its name
Views = dict[int, Tensor]  # view index to embeddings: unit rows [B, D], fp32
Normalize = Callable[[Tensor], Tensor]  # uint8 [B, S, S, 3] to network input [B, 3, S, S]; network input to itself


def as_it_is(images: Tensor) -> Tensor:
    """Return normalised images [B, 3, S, S]."""
    return images


# Settings whose default alone differs between methods.
TeacherMomentum = Annotated[
    float, Field(ge=0, le=1, description="Momentum of the teacher's moving average at the first step.")
]
FinalMomentum = Annotated[
    float | None,
    Field(ge=0, le=1, description="Teacher momentum at the last step, reached along a cosine; null keeps it constant."),
]
BatchNorm = Annotated[
    Literal["shuffle", "sync", "local"],
    Field(
        description="BatchNorm statistics: shuffle moves images between ranks for the teacher (MoCo, sec. 3.3), "
        "sync uses the global batch, local the images of each rank."
    ),
]


class Settings(BaseModel):
    """Settings of every method, and what the trainer needs to know about a method before it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    papers: ClassVar[tuple[str, ...]] = ()  # arXiv identifiers

    name: str = Field(description="Name of the method; it decides which other keys this section has.")
    teacher_momentum: TeacherMomentum = 0.999
    teacher_momentum_final: FinalMomentum = None
    bn: BatchNorm = "shuffle"
    bn_group: int | None = Field(
        None,
        ge=2,
        description="Largest number of images of a rank that share BatchNorm statistics, so that one GPU with 256 "
        "images and groups of 32 trains as eight GPUs with 32 images each; null for all images of a micro-batch. Not "
        "for bn: sync.",
    )

    @model_validator(mode="after")
    def _sync_has_no_groups(self) -> "Settings":
        if self.bn_group and self.bn == "sync":
            raise ValueError("bn_group: goes with bn: shuffle or local; bn: sync normalises over the global batch")
        return self

    @property
    def negatives_class(self) -> type[Negatives] | None:
        """The negatives that section `bank` configures; None for a method without."""
        return None

    @property
    def key_views(self) -> tuple[int, ...]:
        """Indices of the views that give keys; none for a method without keys."""
        return (0, 1)

    @property
    def has_teacher(self) -> bool:
        """Return whether a teacher embeds the key views. Otherwise the student's queries are the keys, detached."""
        return bool(self.key_views)

    def query_views(self, num_views: int) -> list[int]:
        """Return the indices of the views that the student embeds: all, except the key view if there is only one."""
        return [i for i in range(num_views) if self.key_views != (i,)]

    def check(self, batch_size: int, num_views: int, bank: BankSettings) -> None:
        """Raise ValueError if these settings do not fit the global batch size, the views or the negatives."""

    def num_negatives(self, bank: BankSettings) -> int:
        """Return the number of negatives over all ranks, 0 for a method without."""
        return bank.size if self.negatives_class else 0

    def negatives_flops(self, bank: BankSettings, dim: int) -> float:
        """Return the FLOPs of one query with the negatives in a step."""
        return self.negatives_class.flops(bank, dim) if self.negatives_class else 0.0

    def describe_negatives(self, bank: BankSettings) -> str | None:
        """Describe the negatives in a few words, for people; None for a method without."""
        return self.negatives_class.describe(bank) if self.negatives_class else None

    def build_negatives(
        self, bank: BankSettings, dim: int, mesh: DeviceMesh, precision: torch.dtype, seed: int
    ) -> Negatives | None:
        """Build this rank's shard of the negatives, see `models.negatives.base.Negatives`."""
        return self.negatives_class(bank, dim, mesh, precision, seed) if self.negatives_class else None

    def make(self, student: Encoder, negatives: Negatives | None) -> "Method":
        """Build the method around a student and the negatives of `build_negatives`."""
        raise NotImplementedError


class StepOutput(NamedTuple):
    """Result of `Method.forward_step` for one micro-batch.

    Attributes:
        loss: Scalar loss of this rank's images, to be averaged over ranks.
        metrics: Scalar tensors of this rank by name.
        negatives_update: What `Negatives.update` takes: a `BankUpdate` for each key view, or the keys [B, D].
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    negatives_update: Sequence[Any] = ()


class Method:
    """Student, teacher and negatives, and one training step of them.

    A new method overrides `loss`. One with further state also overrides `update_negatives` and `state_dict`.

    Attributes:
        student: Learns by gradient.
        teacher: The moving average of the student; None if the method has none.
        negatives: Bank, queue or None.
        queries_ND: The student's embeddings of the last micro-batch.
    """

    def __init__(self, student: Encoder, settings: Settings, negatives: Negatives | None = None) -> None:
        self.student, self.settings, self.negatives = student, settings, negatives
        self.key_views, self.query_views = settings.key_views, settings.query_views
        self.teacher = make_teacher(student) if settings.has_teacher else None
        self.queries_ND: Tensor | None = None

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute the loss of this rank's queries, with gradient, and keys, without. Called by all ranks, in fp32."""
        raise NotImplementedError

    def update_negatives(
        self,
        updates: Sequence[Sequence[Any]],
        lr: float | Tensor,
        seed: int | Tensor,
        skip: Tensor | None = None,
    ) -> None:
        """Update the negatives, after the student's step and before the teacher's; see `Negatives.update`."""
        if self.negatives:
            self.negatives.update(updates, lr, seed, skip)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that a checkpoint holds besides the networks; they share memory with the method."""
        return {self.negatives.name: self.negatives.state_dict()} if self.negatives else {}

    def loaded(self) -> None:
        """Restore derived tensors after the tensors of `state_dict` were written."""
        if self.negatives:
            self.negatives.loaded()

    def metrics(self) -> dict[str, float]:
        """Return values of the last step for the log. Waits for the device; called by all ranks."""
        assert self.queries_ND is not None
        return embedding_spread(self.queries_ND) | (self.negatives.metrics() if self.negatives else {})

    def forward_step(
        self,
        student: Callable[[list[Tensor]], Tensor],
        views: list[Tensor],
        orders: Sequence[Tensor] = (),
        phase: Phase = record_function,
        normalize: Normalize = as_it_is,
    ) -> StepOutput:
        """Compute loss and metrics of one micro-batch.

        Args:
            student: Computes the queries: `self.student` or a wrapper that averages gradients over ranks.
            views: V image tensors, uint8 [B, S_v, S_v, 3] or normalised [B, 3, S_v, S_v].
            orders: The BatchNorm shuffle of each key view, those of `draw_orders` on the device of the views.
            phase: Surrounds the phases normalize, teacher, student and score, to time them.
            normalize: Makes the networks' input. Images that are exchanged travel as bytes and are normalised then.
        """
        query_views = self.query_views(len(views))
        used_here = query_views if self.shuffles else range(len(views))
        with phase("normalize"):
            inputs = {i: normalize(views[i]) for i in used_here}
        with phase("teacher"):
            if self.shuffles:
                keys = {
                    j: self.keys(views[j], order_B, normalize)
                    for j, order_B in zip(self.key_views, orders, strict=True)
                }
            elif self.teacher:
                keys = {j: self.keys(inputs[j]) for j in self.key_views}
        with phase("student"):
            queries_ND = student([inputs[i] for i in query_views])
        self.queries_ND = queries_ND.detach()
        queries = dict(zip(query_views, queries_ND.chunk(len(query_views)), strict=True))
        if self.teacher is None:
            keys = {j: queries[j].detach() for j in self.key_views}
        with phase("score"), torch.autocast(queries_ND.device.type, enabled=False):
            return self.loss(queries, keys)

    @property
    def shuffles(self) -> bool:
        """Return whether the teacher of a rank embeds images of other ranks or BatchNorm groups."""
        return (
            self.teacher is not None
            and self.settings.bn == "shuffle"
            and (dist.get_world_size() > 1 or self.settings.bn_group is not None)
        )

    def draw_orders(self, batch: int, seed: int) -> list[NDArray[np.int64]]:
        """Draw the BatchNorm shuffle of each key view of a micro-batch, see `models.shuffle`; none if nothing shuffles.

        Args:
            batch: Images of a micro-batch of this rank.
            seed: Seed of the micro-batch, the same on all ranks.
        """
        if not self.shuffles:
            return []
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return [draw_order(batch, rank, world_size, seed + j, self._groups(batch)) for j in self.key_views]

    @torch.no_grad()
    def keys(self, images: Tensor, order_B: Tensor | None = None, normalize: Normalize = as_it_is) -> Tensor:
        """Embed images, as `forward_step` takes them, with the teacher: unit rows [B, D].

        `order_B` is one of `draw_orders`, on the device; None without a shuffle.
        """
        assert self.teacher is not None
        if order_B is None:
            return self.teacher([normalize(images)])
        route = make_shuffle(order_B, dist.get_rank(), dist.get_world_size(), self._groups(len(images)))
        return unshuffle(self.teacher([normalize(shuffle(images, route))]), route)

    def _groups(self, batch: int) -> int:
        """Return into how many groups BatchNorm divides a batch."""
        return -(-batch // (self.settings.bn_group or batch))


def queries_for_key(queries: Views, j: int) -> Tensor:
    """Concatenate the queries that are compared with key view j, view by view: query i belongs to key i mod B."""
    return torch.cat([q_BD for i, q_BD in queries.items() if i != j])


def similarity_metrics(loss: Tensor, positive_N: Tensor, hardest_N: Tensor) -> dict[str, Tensor]:
    """Return the metrics of a contrastive loss from each query's similarity to its key and its hardest negative."""
    return {
        "loss": loss.detach(),
        "pretext_top1": (positive_N > hardest_N).float().mean(),
        "positive_similarity": positive_N.mean(),
        "hardest_similarity": hardest_N.mean(),
    }


def check_temperature(key: str, temperature: float, columns: int) -> None:
    """Raise ValueError, naming the configuration's key, if a sum over so many columns can overflow."""
    try:
        kernels.check_temperature(temperature, columns)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
