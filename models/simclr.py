"""SimCLR (arXiv 2002.05709): the negatives are the other images of the global batch; there is no teacher.

Shape suffixes: B images of this rank, N = 2 B rows of this rank, M = 2 B times the number of ranks, D dimensions.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from models import method
from models.compat import reduce_scatter_single
from models.encoder import Encoder
from models.method import Method, StepOutput, Views
from models.negatives.base import BankSettings, Negatives, gather, world_group


class Settings(method.Settings):
    """Settings of SimCLR. There is no teacher, so teacher_momentum has no effect.

    Each micro-batch (optim.accumulate) is contrasted within itself: more micro-batches mean fewer negatives.
    """

    papers: ClassVar[tuple[str, ...]] = ("2002.05709",)

    name: Literal["simclr"] = Field("simclr", description="SimCLR (arXiv 2002.05709).")
    temperature: float = Field(0.1, gt=0, description="Temperature of the loss (SimCLR: 0.1 for ImageNet).")
    bn: Literal["sync", "local"] = Field(
        "sync", description="BatchNorm statistics: sync uses the global batch, local the images of each rank."
    )

    @property
    def key_views(self) -> tuple[int, ...]:
        """No views."""
        return ()

    def check(self, batch_size: int, num_views: int, bank: BankSettings) -> None:
        """Check that the sum of exponentials fits fp32 and there are two views."""
        method.check_temperature("method.temperature", self.temperature, 2 * batch_size)
        if num_views != 2:
            raise ValueError(f"data.views: simclr pairs two views, got {num_views}")

    def make(self, student: Encoder, negatives: Negatives | None) -> "SimCLR":
        """Build SimCLR."""
        return SimCLR(student, self)


class SimCLR(Method):
    """NT-Xent: each view of the global batch is classified among all others; its target is its image's other view."""

    settings: Settings

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute SimCLR, eq. 1."""
        z_ND = torch.cat([queries[0], queries[1]])
        z_MD = _Gather.apply(z_ND)
        rows_N = torch.arange(len(z_ND), device=z_ND.device)
        first = dist.get_rank() * len(z_ND)
        partner_N = first + rows_N.roll(len(z_ND) // 2)
        s_NM = z_ND @ z_MD.T
        s_NM = s_NM.masked_fill(rows_N[:, None] + first == torch.arange(len(z_MD), device=z_ND.device), -torch.inf)
        loss = torch.nn.functional.cross_entropy(s_NM / self.settings.temperature, partner_N)
        with torch.no_grad():
            positive_N = s_NM[rows_N, partner_N]
            hardest_N = s_NM.scatter(1, partner_N[:, None], -torch.inf).amax(1)
        return StepOutput(loss, method.similarity_metrics(loss, positive_N, hardest_N))


class _Gather(torch.autograd.Function):
    """Gathers the rows of all ranks. The loss of every rank depends on a row, so its gradient is summed over ranks.

    Engines then average over ranks, which gives the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, z_ND: Tensor) -> Tensor:
        return gather(z_ND.detach(), world_group()).clone()

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> Tensor:
        world_size = dist.get_world_size()
        if world_size == 1:
            return grad_MD
        grad_ND = grad_MD.new_empty(len(grad_MD) // world_size, grad_MD.shape[1])
        reduce_scatter_single(grad_ND, grad_MD.contiguous())
        return grad_ND
