"""AdCo (arXiv 2011.08435): an encoder and a bank of learned negatives play a min-max game.

The student's queries are contrasted with the teacher's keys and the bank; the student descends on the loss, the bank
ascends on it, and the teacher follows the student. With a predictor on the student, queries are predictions.

B images of this rank, D dimensions.
"""

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank
from models.negatives.contrast import contrast
from models.negatives.queue import Queue


class Settings(method.Settings):
    """temperature: of the encoder's loss (the adversary's is the bank's). symmetric: views 0 and 1 both give keys,
    and the two directions count one half each; else view 0 is the key of all others. batch_keys: the denominator has
    every rank's keys (the published code) or the own one (the paper). crops: sum or mean of the losses of the queries
    of one key.
    """

    name: Literal["adco"] = "adco"
    temperature: float = Field(0.12, gt=0)
    symmetric: bool = False
    batch_keys: bool = True
    crops: Literal["sum", "mean"] = "sum"

    @property
    def negatives(self) -> Literal["bank", "queue", "none"]:
        return "bank"

    @property
    def key_views(self) -> tuple[int, ...]:
        return (0, 1) if self.symmetric else (0,)

    def check(self, batch_size: int, views: int, negatives: int, bank_temperature: float) -> None:
        columns = negatives + (batch_size if self.batch_keys else 1)
        method.check("method.temperature", self.temperature, columns)
        method.check("bank.temperature", bank_temperature, columns)

    def make(self, student: Encoder, negatives: Bank | Queue | None, kernels: str) -> "AdCo":
        assert isinstance(negatives, Bank)
        return AdCo(student, negatives, self)


class AdCo(Method):
    """The game; `bank` steps by itself, from the queries of the step."""

    def __init__(self, student: Encoder, bank: Bank, settings: Settings) -> None:
        super().__init__(student, settings, bank)
        self.settings = settings

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        assert self.bank
        settings = self.settings
        losses, rows, positives, hardest = [], [], [], []
        for j, k_BD in keys.items():
            q_ND = queries_for_key(queries, j)
            weight = 1 / len(keys) / (len(q_ND) if settings.crops == "mean" else len(k_BD))
            result = contrast(q_ND, k_BD, self.bank, settings.temperature, settings.batch_keys)
            losses.append(result.loss_N.sum() * weight)
            rows.append(result.rows(weight / dist.get_world_size()))
            positives.append(result.positive_N)
            hardest.append(result.hardest_N)
        loss = torch.stack(losses).sum()
        return StepOutput(loss, method.similarities(loss, torch.cat(positives), torch.cat(hardest)), rows)
