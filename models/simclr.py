"""SimCLR (arXiv 2002.05709): the negatives are the batch, of all ranks; there is no teacher.

B images of this rank, N = 2 B rows of this rank, M = 2 B times the number of ranks, D dimensions.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from models import method
from models.encoder import Encoder
from models.method import Method, StepOutput, Views
from models.negatives.bank import Bank, everyone, gather
from models.negatives.queue import Queue


class Settings(method.Settings):
    """There is no teacher, so teacher_momentum has no meaning. A part of a batch (optim.accumulate) is told from itself
    only: more parts are fewer negatives.
    """

    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.1, gt=0)
    bn: Literal["sync", "local"] = "sync"

    @property
    def key_views(self) -> tuple[int, ...]:
        return ()

    def check(self, batch_size: int, views: int, negatives: int, bank_temperature: float) -> None:
        method.check("method.temperature", self.temperature, 2 * batch_size)
        if views != 2:
            raise ValueError(f"data.views: simclr pairs two views, got {views}")

    def make(self, student: Encoder, negatives: Bank | Queue | None, kernels: str) -> "SimCLR":
        return SimCLR(student, self)


class SimCLR(Method):
    """NT-Xent (eq. 1): each of the 2 B R views is told from all others but itself, its partner being the answer."""

    def __init__(self, student: Encoder, settings: Settings) -> None:
        super().__init__(student, settings)
        self.temperature = settings.temperature

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        z_ND = torch.cat([queries[0], queries[1]])
        z_MD = _Gather.apply(z_ND)
        rows_N = torch.arange(len(z_ND), device=z_ND.device)
        first = dist.get_rank() * len(z_ND)
        partner_N = first + rows_N.roll(len(z_ND) // 2)
        s_NM = z_ND @ z_MD.T
        s_NM = s_NM.masked_fill(rows_N[:, None] + first == torch.arange(len(z_MD), device=z_ND.device), -torch.inf)
        loss = torch.nn.functional.cross_entropy(s_NM / self.temperature, partner_N)
        with torch.no_grad():
            positive_N = s_NM[rows_N, partner_N]
            hardest_N = s_NM.scatter(1, partner_N[:, None], -torch.inf).amax(1)
        return StepOutput(loss, method.similarities(loss, positive_N, hardest_N))


class _Gather(torch.autograd.Function):
    """All ranks' rows. Each rank's loss depends on all of them, so a row's gradient is the sum over the ranks.

    Engines then average over ranks: that is the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, z_ND: Tensor) -> Tensor:
        return gather(z_ND.detach(), everyone()).clone()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> Tensor:
        world_size = dist.get_world_size()
        if world_size == 1:
            return grad_MD
        grad_ND = grad_MD.new_empty(len(grad_MD) // world_size, grad_MD.shape[1])
        dist.reduce_scatter_single(grad_ND, grad_MD.contiguous())
        return grad_ND
