"""The contrastive loss of queries against keys and the sharded bank or queue, and its gradient, from one pass.

"The bank" stands for either here. N queries of this rank, B keys of this rank, D dimensions; S ranks hold shards of
the bank, so S * N queries are scored here, each against this rank's part of the columns. The grid of ranks
is described in `models/negatives/bank.py`.

Every rank sends its queries to its row of the grid, scores all of the row's queries against its own shard and keys,
and gets back the sums of its own queries. Nothing that travels depends on the size of the bank.

Queries and keys are rounded to the type of the bank's unit rows first, and every similarity, that to the own key too,
is of the rounded ones. The gradient passes the rounding as if it were not there.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from models.negatives.bank import Bank, BankUpdate, gather
from models.negatives.queue import Queue


class Contrast(NamedTuple):
    """loss_N: with gradient to the queries; the rest without.

    positive_N, hardest_N: similarity to the own key and to the most similar other column (-inf if there is none).
    queries_ND, za_N: all S * N queries that this rank's row of the grid scored, and their sum at the adversary's
    temperature, from which the adversary's `Rows` follow.
    """

    loss_N: Tensor
    positive_N: Tensor
    hardest_N: Tensor
    queries_ND: Tensor
    za_N: Tensor

    def rows(self, weight: float) -> BankUpdate:
        """The adversary's rows, each query weighing `weight` in the loss."""
        return BankUpdate(self.queries_ND, weight / self.za_N)


def contrast(q_ND: Tensor, k_BD: Tensor, bank: Bank | Queue, temperature: float, batch_keys: bool) -> Contrast:
    """AdCo, eq. 2: l_i = log Z_i - q_i . k_i / T, with Z_i over the bank and all ranks' keys (or the own key only).

    q_ND: unit rows, N a multiple of B; query i belongs to key i mod B. k_BD: unit rows, no gradient.
    """
    return Contrast(*_Contrast.apply(q_ND, k_BD, bank, temperature, batch_keys))


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_ND: Tensor, k_BD: Tensor, bank: Bank | Queue, temperature: float, batch_keys: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        replica, shard = bank.mesh.get_local_rank("replica"), bank.mesh.get_local_rank("shard")
        row = bank.mesh.get_group("shard")
        batch = len(k_BD)
        mine = slice(shard * len(q_ND), (shard + 1) * len(q_ND))
        given, k_BD = q_ND.dtype, k_BD.to(bank.n_KD.dtype)
        all_q_ND = gather(q_ND.detach().to(bank.n_KD.dtype), row)
        wide = torch.promote_types(bank.n_KD.dtype, torch.float32)
        own_ND = k_BD.to(wide).repeat(len(q_ND) // batch, 1)
        positive_N = (all_q_ND[mine].to(wide) * own_ND).sum(1)

        # The columns of this rank: its shard, its keys and those of its replicas. A row of the grid has all of them.
        if batch_keys:
            k_MD = gather(k_BD, bank.mesh.get_group("replica"))
            own_N = torch.full((len(all_q_ND),), -1, device=q_ND.device)
            own_N[mine] = torch.arange(len(q_ND), device=q_ND.device) % batch + replica * batch
        else:
            k_MD, own_N = k_BD[:0], None
        adversary = bank.temperature if isinstance(bank, Bank) else temperature  # a queue has no use for the sum
        score = kernels.score(all_q_ND, k_MD, own_N, bank.n_KD, temperature, adversary, kernels=bank.kernels)
        if not batch_keys:
            e_N = torch.exp(positive_N / temperature)
            score.z_N[mine] += e_N
            score.o_ND[mine] += e_N[:, None] * own_ND
            score.za_N[mine] += torch.exp(positive_N / adversary)

        oz_ND = torch.cat([score.o_ND, score.z_N[:, None]], dim=1)
        za_N, hardest_N = score.za_N, score.top_N
        if row.size() > 1:
            summed_ND = oz_ND.new_empty(len(q_ND), oz_ND.shape[1])
            dist.reduce_scatter_single(summed_ND, oz_ND, group=row)
            oz_ND = summed_ND
            dist.all_reduce(za_N, group=row)
            dist.all_reduce(hardest_N, dist.ReduceOp.MAX, group=row)
        o_ND, z_N = oz_ND[:, :-1], oz_ND[:, -1]
        ctx.save_for_backward(((o_ND / z_N[:, None] - own_ND) / temperature).to(given))
        outputs = (z_N.log() - positive_N / temperature, positive_N, hardest_N[mine], all_q_ND, za_N)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dq_ND,) = ctx.saved_tensors
        return (grads[0][:, None] * dq_ND).to(dq_ND.dtype), None, None, None, None
