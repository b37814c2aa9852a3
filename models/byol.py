"""BYOL (arXiv 2006.07733): the student predicts the teacher's embedding of another view; there are no negatives.

B images of this rank, D dimensions.
"""

from typing import Literal

import torch
from pydantic import Field

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank
from models.negatives.queue import Queue


class Settings(method.Settings):
    """teacher_momentum to 1 along a cosine (sec. 3.2). The student needs a predictor: model.predictor."""

    name: Literal["byol"] = "byol"
    teacher_momentum: float = Field(0.996, ge=0, le=1)
    teacher_momentum_final: float | None = Field(1.0, ge=0, le=1)
    bn: Literal["shuffle", "sync", "local"] = "sync"

    def make(self, student: Encoder, negatives: Bank | Queue | None, kernels: str) -> "BYOL":
        if student.predictor is None:
            raise ValueError("model.predictor: byol needs one; give the width of its hidden layer (published: 4096)")
        return BYOL(student, self)


class BYOL(Method):
    """2 - 2 q . k (eq. 2) of both directions; of several queries of a key the mean."""

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        positives = []
        for j, k_BD in keys.items():
            q_ND = queries_for_key(queries, j)
            positives.append((q_ND * k_BD.repeat(len(q_ND) // len(k_BD), 1)).sum(1))
        loss = torch.stack([2 - 2 * positive_N.mean() for positive_N in positives]).sum()
        return StepOutput(loss, {"loss": loss.detach(), "positive_similarity": torch.cat(positives).detach().mean()})
