"""AdCo (arXiv 2011.08435): contrastive learning against a bank of learned negatives.

The student's queries are contrasted with the teacher's keys and the bank. The student descends on the loss, the bank
ascends on it, and the teacher is a moving average of the student. With a predictor on the student, queries are
predictions. Without a teacher, keys are the student's own embeddings.
"""

from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, Negatives
from models.negatives.contrast import contrast


class Settings(method.Settings):
    """Settings of AdCo; section `bank` configures the learned negatives."""

    papers: ClassVar[tuple[str, ...]] = ("2011.08435",)

    name: Literal["adco"] = Field("adco", description="AdCo (arXiv 2011.08435).")
    temperature: float = Field(
        0.12, gt=0, description="Temperature of the encoder's loss; bank.temperature is the adversary's."
    )
    symmetric: bool = Field(
        False, description="Whether views 0 and 1 both give keys, with half the loss each, or view 0 only."
    )
    teacher: bool = Field(
        True,
        description="Whether a teacher gives the keys (AdCo), or the student itself, without gradient, which saves the "
        "teacher's forward. Without a teacher, symmetric must be true, bn sync or local, and model.predictor null.",
    )
    batch_keys: bool = Field(
        True,
        description="Whether the denominator has all ranks' keys (AdCo's code) or the own key only (AdCo, eq. 2).",
    )
    crops: Literal["sum", "mean"] = Field(
        "sum", description="How the losses of several queries of one key are combined."
    )

    @property
    def negatives_class(self) -> type[Negatives]:
        """A bank."""
        return Bank

    @property
    def key_views(self) -> tuple[int, ...]:
        """View 0, or views 0 and 1 if symmetric."""
        return (0, 1) if self.symmetric else (0,)

    @property
    def has_teacher(self) -> bool:
        """Return whether a teacher gives the keys, as the setting `teacher` says."""
        return self.teacher

    @model_validator(mode="after")
    def _queries_are_keys(self) -> "Settings":
        if not (self.teacher or self.symmetric):
            raise ValueError("teacher: false needs symmetric: true, since keys are queries of the other view")
        if not self.teacher and self.bn == "shuffle":
            raise ValueError("teacher: false needs bn: sync or local, since only a teacher's images can be shuffled")
        return self

    def check(self, batch_size: int, num_views: int, bank: BankSettings) -> None:
        """Check that the sums of exponentials at both temperatures fit fp32."""
        columns = bank.size + (batch_size if self.batch_keys else 1)
        method.check_temperature("method.temperature", self.temperature, columns)
        method.check_temperature("bank.temperature", bank.temperature, columns)

    def make(self, student: Encoder, negatives: Negatives | None) -> "AdCo":
        """Build AdCo. Raises ValueError if predictions would be keys."""
        if student.predictor is not None and not self.teacher:
            raise ValueError("model.predictor: needs a teacher, whose keys it predicts; got method.teacher=false")
        return AdCo(student, self, negatives)


class AdCo(Method):
    """The contrastive loss of all pairs of a query and a key view of its image."""

    settings: Settings

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute AdCo, eq. 2, averaged over key views."""
        settings, negatives = self.settings, self.negatives
        assert negatives is not None
        losses, updates, positives, hardest = [], [], [], []
        for j, k_BD in keys.items():
            q_ND = queries_for_key(queries, j)
            weight = 1 / len(keys) / (len(q_ND) if settings.crops == "mean" else len(k_BD))
            result = contrast(q_ND, k_BD, negatives, settings.temperature, settings.batch_keys)
            losses.append(result.loss_N.sum() * weight)
            updates.append(result.bank_update(weight / dist.get_world_size()))
            positives.append(result.positive_N)
            hardest.append(result.hardest_N)
        loss = torch.stack(losses).sum()
        return StepOutput(loss, method.similarity_metrics(loss, torch.cat(positives), torch.cat(hardest)), updates)
