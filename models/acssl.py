"""Adversarial contrastive student-teacher learning (arXiv 2202.13072): mined hard negatives in a triplet-like loss.

A student with projector and predictor, a teacher that follows it, several views, symmetric. Of the paper only the
abstract was at hand; docs/methods.md says which choices are ours and where each comes from.

B images of this rank, N queries of a key view, m mined columns, D dimensions.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank, BankUpdate
from models.negatives.contrast import contrast
from models.negatives.mining import mine
from models.negatives.queue import Queue

_MOST = 128  # columns that the kernels keep of a query


class Settings(method.Settings):
    """negatives_from: where hard negatives are mined: all ranks' teacher keys of this step, and besides a queue of
    earlier ones, or AdCo's learned negatives (section `bank`, both).
    hardest: m, mined for each query; 0: none, only pairs. guard: columns at least so similar are taken for the same
    class and left out; guard_top: then this share of all columns, the most similar ones. 1 and 0: all count.
    form: soft is log(1 + sum_j exp((s_j - s+ + margin) / temperature)), margin the mean of max(0, s_j - s+ + margin).
    pair_weight: of 2 - 2 s+; triplet_weight: of the mined term.
    """

    name: Literal["acssl"] = "acssl"
    negatives_from: Literal["keys", "queue", "bank"] = "keys"
    hardest: int = Field(16, ge=0)
    guard: float = Field(1.0, gt=-1, le=1)
    guard_top: float = Field(0.0, ge=0, lt=1)
    form: Literal["soft", "margin"] = "soft"
    margin: float = Field(0.0, ge=-2, le=2)
    temperature: float = Field(0.2, gt=0)
    pair_weight: float = Field(1.0, ge=0)
    triplet_weight: float = Field(1.0, ge=0)
    teacher_momentum: float = Field(0.99, ge=0, le=1)
    teacher_momentum_final: float | None = Field(1.0, ge=0, le=1)

    @property
    def negatives(self) -> Literal["bank", "queue", "none"]:
        return "none" if self.negatives_from == "keys" else self.negatives_from

    def skipped(self, columns: int) -> int:
        """How many of the most similar columns are left out."""
        return int(self.guard_top * columns)

    def check(self, batch_size: int, views: int, negatives: int, bank_temperature: float) -> None:
        columns = batch_size - 1 + (0 if self.negatives_from == "keys" else negatives)
        kept = self.hardest + self.skipped(columns)
        if kept > _MOST:
            raise ValueError(
                f"method.hardest: {self.hardest} after {self.skipped(columns)} left out (method.guard_top) are "
                f"{kept} columns, at most {_MOST} can be kept; method.guard has no such limit"
            )
        if self.negatives_from == "queue":
            method.check_queue(negatives, 2 * batch_size)
        if self.negatives_from == "bank":  # as the temperature of AdCo's loss, which weighs what the bank is played
            method.check("method.temperature", self.temperature, negatives + batch_size)
            method.check("bank.temperature", bank_temperature, negatives + batch_size)

    def make(self, student: Encoder, negatives: Bank | Queue | None, kernels: str) -> "ACSSL":
        return ACSSL(student, negatives, self, kernels)


class ACSSL(Method):
    """w_pair (2 - 2 s+) + w_triplet triplet(s+, mined s-), the mean over all pairs of a query and a key of its image.

    A queue takes in the keys after the step; a bank makes AdCo's step against the queries.
    """

    def __init__(self, student: Encoder, negatives: Bank | Queue | None, settings: Settings, kernels: str) -> None:
        super().__init__(student, settings, negatives)
        self.settings, self.kernels = settings, kernels

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        results = [self._direction(queries_for_key(queries, j), k_BD) for j, k_BD in keys.items()]
        positive_N, mined_Nm = (torch.cat(x) for x in zip(*results, strict=True))
        settings = self.settings
        loss = settings.pair_weight * (2 - 2 * positive_N).mean()
        metrics = {"positive_similarity": positive_N.detach().mean()}
        if settings.hardest:
            triplet_N = triplet(positive_N, mined_Nm, settings.form, settings.margin, settings.temperature)
            loss = loss + settings.triplet_weight * triplet_N.mean()
            # -1 where all columns are left out: what the log averages has to be finite
            metrics = method.similarities(loss, positive_N.detach(), mined_Nm.detach()[:, 0].clamp(min=-1))
            metrics["mined"] = (mined_Nm > -torch.inf).float().sum(1).mean()
        left: list[Any] = list(keys.values()) if self.queue else []
        if self.bank:
            left = [self._rows(queries_for_key(queries, j), k_BD, self.bank, len(keys)) for j, k_BD in keys.items()]
        return StepOutput(loss, {**metrics, "loss": loss.detach()}, left)

    def _direction(self, q_ND: Tensor, k_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity of queries to their own key [N], and to the mined columns [N, m]."""
        positive_N = (q_ND * k_BD.repeat(len(q_ND) // len(k_BD), 1)).sum(1)
        if not self.settings.hardest:
            return positive_N, positive_N.new_empty(len(q_ND), 0)
        negatives = self.queue or self.bank
        columns = len(k_BD) * dist.get_world_size() - 1 + (negatives.size if negatives else 0)
        skip, guard = self.settings.skipped(columns), self.settings.guard
        below = guard if guard < 1 else torch.inf
        mined_Nm, _ = mine(q_ND, k_BD, negatives, self.settings.hardest, skip=skip, below=below, kernels=self.kernels)
        return positive_N, mined_Nm

    @torch.no_grad()
    def _rows(self, q_ND: Tensor, k_BD: Tensor, bank: Bank, directions: int) -> BankUpdate:
        weight = 1 / directions / len(q_ND) / dist.get_world_size()
        return contrast(q_ND, k_BD, bank, self.settings.temperature, True).rows(weight)


def triplet(positive_N: Tensor, negative_Nm: Tensor, form: str, margin: float, temperature: float) -> Tensor:
    """Each query's triplet-like loss [N] from similarities to its key and to m negatives; -inf counts as none.

    margin: the mean over the negatives there are of max(0, s- - s+ + margin) (FaceNet, arXiv 1503.03832, eq. 2).
    soft: log(1 + sum exp((s- - s+ + margin) / temperature)), its smooth form for several negatives (Hermans et al.,
    arXiv 1703.07737, sec. 2, for one; the multi-class N-pair loss, NeurIPS 2016, eq. 7, for several).
    """
    violation_Nm = negative_Nm - positive_N[:, None] + margin
    if form == "soft":
        return torch.logsumexp(F.pad(violation_Nm / temperature, (1, 0)), 1)
    return F.relu(violation_Nm).sum(1) / (negative_Nm > -torch.inf).sum(1).clamp(min=1)
