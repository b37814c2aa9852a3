"""MoCo v2 (arXiv 1911.05722, 2003.04297): the negatives are the keys that the teacher made last.

B images of this rank, D dimensions.
"""

from typing import Literal

import torch
from pydantic import Field

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank
from models.negatives.contrast import contrast
from models.negatives.queue import Queue


class Settings(method.Settings):
    """symmetric: views 0 and 1 both give keys, the losses are averaged and the queue takes both (the CIFAR
    demonstration of github.com/facebookresearch/moco); else view 0 is the key. bank.size is the queue's length.
    """

    name: Literal["moco"] = "moco"
    temperature: float = Field(0.2, gt=0)
    symmetric: bool = False

    @property
    def negatives(self) -> Literal["bank", "queue", "none"]:
        return "queue"

    @property
    def key_views(self) -> tuple[int, ...]:
        return (0, 1) if self.symmetric else (0,)

    def check(self, batch_size: int, views: int, negatives: int, bank_temperature: float) -> None:
        method.check("method.temperature", self.temperature, negatives + 1)
        method.check_queue(negatives, batch_size * (2 if self.symmetric else 1))

    def make(self, student: Encoder, negatives: Bank | Queue | None, kernels: str) -> "MoCo":
        assert isinstance(negatives, Queue)
        return MoCo(student, negatives, self)


class MoCo(Method):
    """Queries against the own key and the queue (MoCo, eq. 1), which takes in the keys after the step.

    Only then, so that in the symmetric form no query meets a key of its own image as a negative.
    """

    def __init__(self, student: Encoder, queue: Queue, settings: Settings) -> None:
        super().__init__(student, settings, queue)
        self.temperature = settings.temperature

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        assert self.queue
        results = [
            contrast(queries_for_key(queries, j), k_BD, self.queue, self.temperature, False) for j, k_BD in keys.items()
        ]
        loss = torch.cat([r.loss_N for r in results]).mean()
        positive_N, hardest_N = (
            torch.cat(x) for x in zip(*((r.positive_N, r.hardest_N) for r in results), strict=True)
        )
        return StepOutput(loss, method.similarities(loss, positive_N, hardest_N), list(keys.values()))
