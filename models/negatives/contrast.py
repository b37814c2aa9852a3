"""The contrastive loss of queries against keys and sharded negatives, and its gradient, from one pass.

Shape suffixes: N queries of this rank, B keys of this rank, D dimensions. S ranks hold different shards of the
negatives, so each rank scores S * N queries against its own columns. `models/negatives/base.py` describes the grid of
ranks.

Every rank sends its queries to its row of the grid, scores all queries of the row against its own shard and keys, and
receives the sums of its own queries. The traffic does not depend on the number of negatives.

Queries and keys are first rounded to the dtype of the negatives' unit rows, and all similarities, also those to the own
key, are of the rounded vectors. The gradient treats the rounding as the identity.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from models.compat import reduce_scatter_single
from models.negatives.bank import BankUpdate
from models.negatives.base import Negatives, gather


class Contrast(NamedTuple):
    """Result of `contrast`; only the loss has a gradient.

    Attributes:
        loss_N: Loss of each query.
        positive_N: Similarity to the own key.
        hardest_N: Similarity to the most similar other column, -inf if there is none.
        queries_ND: All S * N queries of this rank's row of the grid.
        za_N: Their partition sums at the adversary's temperature.
    """

    loss_N: Tensor
    positive_N: Tensor
    hardest_N: Tensor
    queries_ND: Tensor
    za_N: Tensor

    def bank_update(self, weight: float) -> BankUpdate:
        """Return what the bank's step needs if each query has this weight in the loss."""
        return BankUpdate(self.queries_ND, weight / self.za_N)


def contrast(
    q_ND: Tensor,
    k_BD: Tensor,
    negatives: Negatives,
    temperature: float,
    batch_keys: bool,
    own_A: Tensor | None = None,
) -> Contrast:
    """Compute l_i = log Z_i - q_i . k_i / T (AdCo, eq. 2). Called by all ranks.

    Args:
        q_ND: Unit queries. N is a multiple of B, and query i belongs to key i mod B.
        k_BD: Unit keys, without gradient.
        negatives: The columns of Z_i besides the keys.
        temperature: T.
        batch_keys: Whether Z_i includes the keys of all ranks or the own key only.
        own_A: Where the keys are themselves rows of `negatives`: the index of each query's row, int64, for the
            A = S * N queries of this rank's row of the grid. Then Z_i has no other columns than `negatives`.
    """
    with torch.no_grad():
        loss_N, dq_ND, *others = _contrast(q_ND.detach(), k_BD, negatives, temperature, batch_keys, own_A)
    return Contrast(_WithGradient.apply(loss_N, q_ND, dq_ND), *others)


def _contrast(
    q_ND: Tensor,
    k_BD: Tensor,
    negatives: Negatives,
    temperature: float,
    batch_keys: bool,
    own_A: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the loss, its gradient to the queries, and the other fields of `Contrast`."""
    mesh, n_KD = negatives.mesh, negatives.n_KD
    replica, shard = mesh.get_local_rank("replica"), mesh.get_local_rank("shard")
    row = mesh.get_group("shard")
    batch = len(k_BD)
    mine = slice(shard * len(q_ND), (shard + 1) * len(q_ND))
    input_dtype, k_BD = q_ND.dtype, k_BD.to(n_KD.dtype)
    all_q_ND = gather(q_ND.to(n_KD.dtype), row)
    wide = torch.promote_types(n_KD.dtype, torch.float32)
    own_ND = k_BD.to(wide).repeat(len(q_ND) // batch, 1)
    positive_N = (all_q_ND[mine].to(wide) * own_ND).sum(1)

    # This rank's columns are its shard, its keys and those of its replicas: a row of the grid has all columns.
    if own_A is not None:
        # This shard's rows are passed as keys, because `score` can mark a query's own row among keys only.
        local_A = own_A - negatives.first
        k_MD, own_N, n_KD = n_KD, local_A.where((local_A >= 0) & (local_A < len(n_KD)), -1), n_KD[:0]
    elif batch_keys:
        k_MD = gather(k_BD, mesh.get_group("replica"))
        own_N = torch.full((len(all_q_ND),), -1, device=q_ND.device)
        own_N[mine] = torch.arange(len(q_ND), device=q_ND.device) % batch + replica * batch
    else:
        k_MD, own_N = k_BD[:0], None
    adversary = negatives.adversary_temperature
    if adversary is None:
        adversary = temperature
    score = kernels.score(all_q_ND, k_MD, own_N, n_KD, temperature, adversary)
    if own_A is None and not batch_keys:
        e_N = torch.exp(positive_N / temperature)
        score.z_N[mine] += e_N
        score.o_ND[mine] += e_N[:, None] * own_ND
        score.za_N[mine] += torch.exp(positive_N / adversary)

    o_ND, z_N, za_N, hardest_N = score.o_ND, score.z_N, score.za_N, score.top_N
    if row.size() > 1:
        sums_ND = torch.cat([o_ND, z_N[:, None], za_N[:, None]], dim=1)
        own_sums_ND = sums_ND.new_empty(len(q_ND), sums_ND.shape[1])
        reduce_scatter_single(own_sums_ND, sums_ND, group=row)
        o_ND, z_N = own_sums_ND[:, :-2], own_sums_ND[:, -2]
        # One reduction gathers the sums at the adversary's temperature, which are positive, and finds the maxima.
        za_and_hardest_2A = torch.stack([torch.zeros_like(za_N), hardest_N])
        za_and_hardest_2A[0, mine] = own_sums_ND[:, -1]
        dist.all_reduce(za_and_hardest_2A, dist.ReduceOp.MAX, group=row)
        za_N, hardest_N = za_and_hardest_2A.unbind()
    dq_ND = ((o_ND / z_N[:, None] - own_ND) / temperature).to(input_dtype)
    return z_N.log() - positive_N / temperature, dq_ND, positive_N, hardest_N[mine], all_q_ND, za_N


class _WithGradient(torch.autograd.Function):
    """Gives values [N] a gradient [N, D] to x [N, D] that is known already."""

    @staticmethod
    def forward(ctx: Any, value_N: Tensor, x_ND: Tensor, gradient_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_ND)
        return value_N.view_as(value_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return None, (grad_N[:, None] * gradient_ND).to(gradient_ND.dtype), None
