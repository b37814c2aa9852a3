"""MoCo v2 (arXiv 1911.05722, 2003.04297): the negatives are the teacher's latest keys."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.base import BankSettings, Negatives
from models.negatives.contrast import contrast
from models.negatives.queue import Queue, check_queue


class Settings(method.Settings):
    """Settings of MoCo v2; bank.size is the length of the queue."""

    papers: ClassVar[tuple[str, ...]] = ("1911.05722", "2003.04297")

    name: Literal["moco"] = Field("moco", description="MoCo v2 (arXiv 2003.04297).")
    temperature: float = Field(0.2, gt=0, description="Temperature of the loss (MoCo v2: 0.2).")
    symmetric: bool = Field(
        False,
        description=(
            "Whether views 0 and 1 both give keys, with the sum of both losses and all keys entering the queue "
            "(the CIFAR demonstration of github.com/facebookresearch/moco), or view 0 only."
        ),
    )

    @property
    def negatives_class(self) -> type[Negatives]:
        """A queue."""
        return Queue

    @property
    def key_views(self) -> tuple[int, ...]:
        """View 0, or views 0 and 1 if symmetric."""
        return (0, 1) if self.symmetric else (0,)

    def check(self, batch_size: int, num_views: int, bank: BankSettings) -> None:
        """Check that the sum of exponentials fits fp32 and a step's keys fit the queue."""
        method.check_temperature("method.temperature", self.temperature, bank.size + 1)
        check_queue(bank, batch_size * len(self.key_views))

    def make(self, student: Encoder, negatives: Negatives | None) -> "MoCo":
        """Build MoCo."""
        return MoCo(student, self, negatives)


class MoCo(Method):
    """The contrastive loss of queries against their own key and the queue.

    The keys enter the queue after the step, so in the symmetric form no key of a query's own image is a negative.
    """

    settings: Settings

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute MoCo, eq. 1: the mean over the queries of a key view, summed over key views."""
        assert self.negatives is not None
        results = [
            contrast(queries_for_key(queries, j), k_BD, self.negatives, self.settings.temperature, batch_keys=False)
            for j, k_BD in keys.items()
        ]
        loss = torch.stack([r.loss_N.mean() for r in results]).sum()
        positive_N, hardest_N = torch.cat([r.positive_N for r in results]), torch.cat([r.hardest_N for r in results])
        return StepOutput(loss, method.similarity_metrics(loss, positive_N, hardest_N), list(keys.values()))
