"""BYOL (arXiv 2006.07733): the student predicts the teacher's embedding of another view; there are no negatives."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.base import Negatives


class Settings(method.Settings):
    """Settings of BYOL. The student needs a predictor: model.predictor."""

    papers: ClassVar[tuple[str, ...]] = ("2006.07733",)

    name: Literal["byol"] = Field("byol", description="BYOL (arXiv 2006.07733).")
    teacher_momentum: method.TeacherMomentum = Field(
        0.996, description="Momentum of the teacher's moving average at the first step (BYOL, sec. 3.2)."
    )
    teacher_momentum_final: method.FinalMomentum = Field(
        1.0, description="Teacher momentum at the last step, reached along a cosine (BYOL, sec. 3.2); null: constant."
    )
    bn: method.BatchNorm = "sync"

    def make(self, student: Encoder, negatives: Negatives | None) -> "BYOL":
        """Build BYOL. Raises ValueError if the student has no predictor."""
        if student.predictor is None:
            raise ValueError("model.predictor: byol needs one; set the width of its hidden layer (BYOL: 4096)")
        return BYOL(student, self)


class BYOL(Method):
    """The squared distance of predictions to the keys of the other views."""

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute 2 - 2 q . k (BYOL, eq. 2): the mean over the queries of a key view, summed over both key views."""
        positives = []
        for j, k_BD in keys.items():
            q_ND = queries_for_key(queries, j)
            positives.append((q_ND * k_BD.repeat(len(q_ND) // len(k_BD), 1)).sum(1))
        loss = torch.stack([2 - 2 * positive_N.mean() for positive_N in positives]).sum()
        return StepOutput(loss, {"loss": loss.detach(), "positive_similarity": torch.cat(positives).detach().mean()})
