"""Adversarial contrastive student-teacher learning (arXiv 2202.13072): mined hard negatives in a triplet-like loss.

A student with projector and predictor, a teacher that is its moving average, several views, symmetric. Only the paper's
abstract was available; docs/methods.md lists the choices that are ours and their sources.

Shape suffixes: B images of this rank, N queries of a key view, m mined columns, D dimensions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank, BankUpdate
from models.negatives.base import BankSettings, Negatives
from models.negatives.contrast import contrast
from models.negatives.mining import mine
from models.negatives.queue import Queue, check_queue

_MAX_COLUMNS = 128  # that the Triton kernel keeps of a query


class Settings(method.Settings):
    """Settings of the adversarial contrastive student-teacher method."""

    papers: ClassVar[tuple[str, ...]] = ("2202.13072",)

    name: Literal["acssl"] = Field(
        "acssl", description="Adversarial contrastive student-teacher learning (after arXiv 2202.13072)."
    )
    negatives_from: Literal["keys", "queue", "bank"] = Field(
        "keys",
        description=(
            "Where hard negatives are mined: the keys of all ranks in this step, or these and a queue of earlier keys, "
            "or these and AdCo's learned negatives."
        ),
    )
    hardest: int = Field(16, ge=0, description="Number of negatives mined for each query; 0 uses pairs only.")
    guard: float = Field(
        1.0, gt=-1, le=1, description="Columns of at least this similarity are taken for the same class and left out."
    )
    guard_top: float = Field(
        0.0, ge=0, lt=1, description="Share of all columns, the most similar ones, that is left out after `guard`."
    )
    form: Literal["soft", "margin"] = Field(
        "soft",
        description=(
            "Triplet-like loss: soft is log(1 + sum_j exp((s_j - s+ + margin) / temperature)), "
            "margin is the mean of max(0, s_j - s+ + margin)."
        ),
    )
    margin: float = Field(0.0, ge=-2, le=2, description="Margin between positive and negative similarities.")
    temperature: float = Field(0.2, gt=0, description="Temperature of the soft form.")
    pair_weight: float = Field(1.0, ge=0, description="Weight of the pairs' term 2 - 2 s+.")
    triplet_weight: float = Field(1.0, ge=0, description="Weight of the triplet-like term.")
    teacher_momentum: method.TeacherMomentum = 0.99
    teacher_momentum_final: method.FinalMomentum = 1.0

    @property
    def negatives_class(self) -> type[Negatives] | None:
        """A bank, a queue or None, as `negatives_from` says."""
        return {"keys": None, "queue": Queue, "bank": Bank}[self.negatives_from]

    def num_skipped(self, columns: int) -> int:
        """Return how many of the most similar columns `guard_top` leaves out."""
        return int(self.guard_top * columns)

    def check(self, batch_size: int, num_views: int, bank: BankSettings) -> None:
        """Check the number of mined columns, the queue's length and the sums of exponentials."""
        columns = batch_size - 1 + self.num_negatives(bank)
        kept = self.hardest + self.num_skipped(columns)
        if kept > _MAX_COLUMNS:
            raise ValueError(
                f"method.hardest: {self.hardest} after {self.num_skipped(columns)} left out (method.guard_top) are "
                f"{kept} columns, at most {_MAX_COLUMNS} can be kept; method.guard has no such limit"
            )
        if self.negatives_from == "queue":
            check_queue(bank, 2 * batch_size)
        if self.negatives_from == "bank":  # the temperatures of AdCo's loss, which weighs the bank's queries
            method.check_temperature("method.temperature", self.temperature, bank.size + batch_size)
            method.check_temperature("bank.temperature", bank.temperature, bank.size + batch_size)

    def make(self, student: Encoder, negatives: Negatives | None) -> "ACSSL":
        """Build the method."""
        return ACSSL(student, self, negatives)


class ACSSL(Method):
    """The loss pair_weight (2 - 2 s+) + triplet_weight triplet(s+, mined s-) over all pairs of a query and its key.

    A queue takes in the keys after the step. A bank takes AdCo's step against the queries.
    """

    settings: Settings

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute the mean loss over all pairs of a query and a key of its image."""
        settings = self.settings
        results = [self._similarities(queries_for_key(queries, j), k_BD) for j, k_BD in keys.items()]
        positive_N, mined_Nm = (torch.cat(x) for x in zip(*results, strict=True))
        loss = settings.pair_weight * (2 - 2 * positive_N).mean()
        metrics = {"positive_similarity": positive_N.detach().mean()}
        if settings.hardest:
            triplet_N = triplet(positive_N, mined_Nm, settings.form, settings.margin, settings.temperature)
            loss = loss + settings.triplet_weight * triplet_N.mean()
            # -1 replaces -inf where all columns are left out, because logged averages must be finite.
            hardest_N = mined_Nm.detach()[:, 0].clamp(min=-1)
            metrics = method.similarity_metrics(loss, positive_N.detach(), hardest_N)
            metrics["mined"] = (mined_Nm > -torch.inf).float().sum(1).mean()
        return StepOutput(loss, {**metrics, "loss": loss.detach()}, self._negatives_update(queries, keys))

    def _similarities(self, q_ND: Tensor, k_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the similarities of queries to their own key [N] and to the mined columns [N, m]."""
        positive_N = (q_ND * k_BD.repeat(len(q_ND) // len(k_BD), 1)).sum(1)
        if not self.settings.hardest:
            return positive_N, positive_N.new_empty(len(q_ND), 0)
        negatives, guard = self.negatives, self.settings.guard
        columns = len(k_BD) * dist.get_world_size() - 1 + (negatives.size if negatives else 0)
        skip, below = self.settings.num_skipped(columns), guard if guard < 1 else None
        mined_Nm, _ = mine(q_ND, k_BD, negatives, self.settings.hardest, skip=skip, below=below)
        return positive_N, mined_Nm

    @torch.no_grad()
    def _negatives_update(self, queries: Views, keys: Views) -> Sequence[Any]:
        if self.settings.negatives_from == "queue":
            return list(keys.values())
        updates: list[BankUpdate] = []
        if self.settings.negatives_from == "bank":
            assert self.negatives is not None
            for j, k_BD in keys.items():
                q_ND = queries_for_key(queries, j)
                weight = 1 / len(keys) / len(q_ND) / dist.get_world_size()
                result = contrast(q_ND, k_BD, self.negatives, self.settings.temperature, batch_keys=True)
                updates.append(result.bank_update(weight))
        return updates


def triplet(positive_N: Tensor, negative_Nm: Tensor, form: str, margin: float, temperature: float) -> Tensor:
    """Compute each query's triplet-like loss from its similarities to its key and to m negatives.

    Args:
        positive_N: Similarity to the own key.
        negative_Nm: Similarities to negatives; -inf marks a missing one.
        form: `margin` is the mean over the negatives of max(0, s- - s+ + margin) (FaceNet, arXiv 1503.03832, eq. 2).
            `soft` is log(1 + sum exp((s- - s+ + margin) / temperature)), its smooth form (Hermans et al., arXiv
            1703.07737, sec. 2, for one negative; multi-class N-pair loss, NeurIPS 2016, eq. 7, for several).
        margin: Margin between the similarities.
        temperature: Temperature of the soft form.

    Returns:
        Loss [N].
    """
    violation_Nm = negative_Nm - positive_N[:, None] + margin
    if form == "soft":
        return torch.logsumexp(F.pad(violation_Nm / temperature, (1, 0)), 1)
    return F.relu(violation_Nm).sum(1) / (negative_Nm > -torch.inf).sum(1).clamp(min=1)
