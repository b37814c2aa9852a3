"""Online mining: the similarities of each query to the columns that are hardest for it, with gradient.

Shape suffixes: N queries of this rank, B keys of this rank, D dimensions, m mined columns. S ranks hold different
shards of the columns, so each rank searches for A = S * N queries, and returns C candidates for each. The columns are
the keys of all ranks and, if there are any, the negatives in their placement (`models/negatives/base.py`).

Every rank sends its queries to the ranks of its row, finds their hardest columns among its own, and returns the
similarities and column indices. Backward sends each similarity's gradient to the rank that holds the column, which
computes the weighted sum of columns. No A x K tensor exists, and columns are not sent.
"""

from typing import Any, NamedTuple

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
    with torch.no_grad():
        found = _find(q_ND.detach(), k_BD, negatives, m, skip, below)
    similarity_Nm: Tensor = _WithGradient.apply(
        found.similarity_Nm, q_ND, found.slot_Nm, found.row, found.candidates, *found.columns, *found.blocks
    )
    return similarity_Nm, found.index_Nm


class _Found(NamedTuple):
    """Result of the search.

    Attributes:
        similarity_Nm: Similarities of the mined columns.
        index_Nm: Their indices.
        slot_Nm: Their positions among the candidates of all ranks.
        candidates: Number of candidates of a query.
        row: The ranks that searched.
        blocks: This rank's columns: keys, then negatives if it has any.
        columns: Its own candidates for all queries [A, C], as positions in each block.
    """

    similarity_Nm: Tensor
    index_Nm: Tensor
    slot_Nm: Tensor
    candidates: int
    row: dist.ProcessGroup
    blocks: list[Tensor]
    columns: list[Tensor]


def _find(q_ND: Tensor, k_BD: Tensor, negatives: Negatives | None, m: int, skip: int, below: float | None) -> _Found:
    world_size, batch, num_queries = dist.get_world_size(), len(k_BD), len(q_ND)
    row, replicas = world_group(), None
    shard, replica, precision = dist.get_rank(), 0, q_ND.dtype
    if negatives is not None:
        row, replicas = negatives.mesh.get_group("shard"), negatives.mesh.get_group("replica")
        shard, replica = negatives.mesh.get_local_rank("shard"), negatives.mesh.get_local_rank("replica")
        precision = negatives.n_KD.dtype
    shards = row.size()
    all_q_AD = gather(q_ND.to(precision), row)
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
        indices.append(index_C[found.column_Nm].masked_fill(found.column_Nm < 0, torch.iinfo(torch.int32).max))
        columns.append(found.column_Nm)
    similarity_AC, index_AC = torch.cat(similarities, 1), torch.cat(indices, 1)
    # Both are sent together, the indices as the bits of floating-point numbers.
    bits = torch.int32 if similarity_AC.dtype == torch.float32 else torch.int64
    sent_A2C = torch.cat([similarity_AC, index_AC.to(bits).view(similarity_AC.dtype)], 1)
    similarity_NC, index_NC = _to_owners(sent_A2C, row).unflatten(1, (shards, 2, -1)).unbind(2)
    similarity_NC, index_NC = similarity_NC.flatten(1), index_NC.flatten(1).view(bits).to(torch.int64)
    by_index_NC = index_NC.argsort(1)
    order_NC = similarity_NC.gather(1, by_index_NC).argsort(dim=1, descending=True, stable=True)
    slot_Nm = by_index_NC.gather(1, order_NC)[:, skip : skip + m]
    similarity_Nm = similarity_NC.gather(1, slot_Nm)
    index_Nm = index_NC.gather(1, slot_Nm).masked_fill(similarity_Nm == -torch.inf, -1)
    return _Found(
        similarity_Nm, index_Nm, slot_Nm, similarity_NC.shape[1], row, [c_CD for c_CD, _, _ in blocks], columns
    )


class _WithGradient(torch.autograd.Function):
    """Gives the similarities of `_Found` their gradient to the queries. All ranks of the group call backward."""

    @staticmethod
    def forward(
        ctx: Any,
        similarity_Nm: Tensor,
        q_ND: Tensor,
        slot_Nm: Tensor,
        row: dist.ProcessGroup,
        candidates: int,
        *columns_and_blocks: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(slot_Nm, *columns_and_blocks)
        ctx.row, ctx.input_dtype, ctx.candidates = row, q_ND.dtype, candidates
        return similarity_Nm.view_as(similarity_Nm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slot_Nm, *rest = ctx.saved_tensors
        row = ctx.row
        columns, blocks = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        grad_NC = grads[0].new_zeros(len(slot_Nm), ctx.candidates).scatter_(1, slot_Nm, grads[0])
        weights = _from_owners(grad_NC, row).chunk(len(blocks), 1)
        dq_AD = torch.stack([_weigh(*x) for x in zip(weights, columns, blocks, strict=True)]).sum(0)
        if row.size() > 1:
            dq_ND = dq_AD.new_empty(len(slot_Nm), dq_AD.shape[1])
            reduce_scatter_single(dq_ND, dq_AD, group=row)
            dq_AD = dq_ND
        return None, dq_AD.to(ctx.input_dtype), None, None, None, *[None] * len(rest)


def _to_owners(x_AC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """Send each rank's values for all queries to the queries' owners: [A, C] to [N, S * C]."""
    shards = row.size()
    if shards == 1:
        return x_AC
    return rearrange(_exchange(x_AC.contiguous(), row), "(s n) c -> n (s c)", s=shards)


def _from_owners(x_NC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """Invert `_to_owners`."""
    shards = row.size()
    if shards == 1:
        return x_NC
    return _exchange(rearrange(x_NC, "n (s c) -> (s n) c", s=shards).contiguous(), row)


def _exchange(x_AC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """Send the s-th part of the rows to rank s, and return the parts that come from each rank in order."""
    received_AC = torch.empty_like(x_AC)
    dist.all_to_all_single(received_AC, x_AC, group=row)
    return received_AC


def _weigh(weight_AC: Tensor, column_AC: Tensor, c_KD: Tensor) -> Tensor:
    """Compute sum_c weight_ac c_{column_ac}, [A, D]; columns of index -1 have weight 0."""
    return torch.cat(
        [
            torch.einsum("ac,acd->ad", weight, c_KD[column.clamp(min=0)].to(weight.dtype))
            for weight, column in zip(weight_AC.split(_ROWS), column_AC.split(_ROWS), strict=True)
        ]
    )
