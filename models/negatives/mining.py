"""Online mining: the similarities of each query to the columns that are hardest for it, with gradient.

Shape suffixes: N queries of this rank, B keys of this rank, D dimensions, m mined columns. S ranks hold different
shards of the columns, so each rank searches for A = S * N queries, and returns C candidates for each. The columns are
the keys of all ranks and, if there are any, the negatives in their placement (`models/negatives/base.py`).

Every rank sends its queries to the ranks of its row, finds their hardest columns among its own, and returns the
similarities and column indices. Backward sends each similarity's gradient to the rank that holds the column, which
computes the weighted sum of columns. No A x K tensor exists, and columns are not sent.
"""

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

import kernels
from models.compat import reduce_scatter_single
from models.negatives.base import Negatives, gather, world_group

_ROWS = 1024  # queries whose candidates [_ROWS, C, D] are gathered at a time


def mine(
    q_ND: Tensor,
    k_BD: Tensor,
    negatives: Negatives | None,
    m: int,
    *,
    skip: int = 0,
    below: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the hardest columns of each query. Called by all ranks.

    Similarities are of vectors rounded to the dtype of the negatives' rows. The gradient reaches the queries only.

    Args:
        q_ND: Unit queries. N is a multiple of B, and query i belongs to key i mod B, which is left out.
        k_BD: Unit keys, without gradient.
        negatives: Columns besides the keys; None for none.
        m: Number of columns to find.
        skip: Number of hardest columns to leave out, among those that `below` keeps.
        below: Only columns less similar than this count; None for all.

    Returns:
        Similarities [N, m], hardest first, and column indices, int64 [N, m]: keys in the order of the ranks, then
        negatives. Equal similarities are in the order of the indices. Missing columns have similarity -inf and
        index -1.
    """
    similarity_Nm, index_Nm = _Mine.apply(q_ND, k_BD, negatives, m, skip, below)
    return similarity_Nm, index_Nm


class _Mine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_ND: Tensor,
        k_BD: Tensor,
        negatives: Negatives | None,
        m: int,
        skip: int,
        below: float | None,
    ) -> tuple[Tensor, Tensor]:
        world_size, batch, num_queries = dist.get_world_size(), len(k_BD), len(q_ND)
        row, replicas = world_group(), None
        shard, replica, precision = dist.get_rank(), 0, q_ND.dtype
        if negatives is not None:
            row, replicas = negatives.mesh.get_group("shard"), negatives.mesh.get_group("replica")
            shard, replica = negatives.mesh.get_local_rank("shard"), negatives.mesh.get_local_rank("replica")
            precision = negatives.n_KD.dtype
        shards = row.size()
        all_q_AD = gather(q_ND.detach().to(precision), row)
        k_MD = k_BD.to(precision)
        if replicas is not None:
            k_MD = gather(k_MD, replicas)
        own_A = torch.full((len(all_q_AD),), -1, device=q_ND.device)
        mine = slice(shard * num_queries, (shard + 1) * num_queries)
        own_A[mine] = torch.arange(num_queries, device=q_ND.device) % batch + replica * batch
        # Global indices of this rank's columns: the keys of rank r begin at r * batch.
        rank_M = torch.arange(world_size // shards, device=q_ND.device).repeat_interleave(batch) * shards + shard
        index_M = rank_M * batch + torch.arange(len(k_MD), device=q_ND.device) % batch
        blocks: list[tuple[Tensor, Tensor | None, Tensor]] = [(k_MD, own_A, index_M)]
        if negatives is not None and len(negatives.n_KD):
            index_K = torch.arange(len(negatives.n_KD), device=q_ND.device) + world_size * batch + negatives.first
            blocks.append((negatives.n_KD, None, index_K))

        similarities, indices, columns = [], [], []
        for c_CD, own, index_C in blocks:
            found = kernels.hardest(all_q_AD, c_CD, own, m + skip, below)
            similarities.append(found.similarity_Nm)
            indices.append(index_C[found.column_Nm].masked_fill(found.column_Nm < 0, torch.iinfo(torch.int64).max))
            columns.append(found.column_Nm)
        similarity_NC = _to_owners(torch.cat(similarities, 1), row)
        index_NC = _to_owners(torch.cat(indices, 1), row)
        by_index_NC = index_NC.argsort(1)
        order_NC = similarity_NC.gather(1, by_index_NC).argsort(dim=1, descending=True, stable=True)
        slot_Nm = by_index_NC.gather(1, order_NC)[:, skip : skip + m]
        similarity_Nm = similarity_NC.gather(1, slot_Nm)
        index_Nm = index_NC.gather(1, slot_Nm).masked_fill(similarity_Nm == -torch.inf, -1)

        ctx.save_for_backward(slot_Nm, *columns, *(c_CD for c_CD, _, _ in blocks))
        ctx.row, ctx.input_dtype, ctx.candidates = row, q_ND.dtype, similarity_NC.shape[1]
        ctx.mark_non_differentiable(index_Nm)
        return similarity_Nm, index_Nm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slot_Nm, *rest = ctx.saved_tensors
        columns, blocks = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        grad_NC = grads[0].new_zeros(len(slot_Nm), ctx.candidates).scatter_(1, slot_Nm, grads[0])
        weights = _from_owners(grad_NC, ctx.row).chunk(len(blocks), 1)
        dq_AD = torch.stack([_weigh(*x) for x in zip(weights, columns, blocks, strict=True)]).sum(0)
        if ctx.row.size() > 1:
            dq_ND = dq_AD.new_empty(len(slot_Nm), dq_AD.shape[1])
            reduce_scatter_single(dq_ND, dq_AD, group=ctx.row)
            dq_AD = dq_ND
        return dq_AD.to(ctx.input_dtype), None, None, None, None, None


def _to_owners(x_AC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """Send each rank's values for all queries to the queries' owners: [A, C] to [N, S * C]."""
    shards = row.size()
    if shards == 1:
        return x_AC
    received_SNC = torch.empty_like(x_AC).view(shards, -1, x_AC.shape[1])
    dist.all_to_all_single(received_SNC, x_AC.contiguous(), group=row)
    return rearrange(received_SNC, "s n c -> n (s c)")


def _from_owners(x_NC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """Invert `_to_owners`."""
    shards = row.size()
    if shards == 1:
        return x_NC
    sent_SNC = rearrange(x_NC, "n (s c) -> s n c", s=shards).contiguous()
    received_SNC = torch.empty_like(sent_SNC)
    dist.all_to_all_single(received_SNC, sent_SNC, group=row)
    return rearrange(received_SNC, "s n c -> (s n) c")


def _weigh(weight_AC: Tensor, column_AC: Tensor, c_KD: Tensor) -> Tensor:
    """Compute sum_c weight_ac c_{column_ac}, [A, D]; columns of index -1 have weight 0."""
    return torch.cat(
        [
            torch.einsum("ac,acd->ad", weight, c_KD[column.clamp(min=0)].to(weight.dtype))
            for weight, column in zip(weight_AC.split(_ROWS), column_AC.split(_ROWS), strict=True)
        ]
    )
