"""Online mining: the similarities of each query to the columns that are hardest for it, with gradient.

N queries of this rank, B keys of this rank, D dimensions; S ranks hold different parts of the columns, so A = S * N
queries are looked at here. The columns are all ranks' keys of this step and the bank or queue, if there is one, cut
over ranks as it is (`models/negatives/bank.py`). m columns are mined for each query; C candidates are sent per rank.

Every rank sends its queries to the ranks of its row, finds their hardest columns among its own, and sends back their
similarities and numbers. Backward returns each similarity's gradient to the rank that has the column, and there the
weighted sum of columns is made. No A x K tensor exists, and no column travels.
"""

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

import kernels as kernel_functions
from models.negatives.bank import Bank, everyone, gather
from models.negatives.queue import Queue

_ROWS = 1024  # queries at a time whose candidates are gathered: [_ROWS, C, D]


def mine(
    q_ND: Tensor,
    k_BD: Tensor,
    negatives: Bank | Queue | None,
    m: int,
    *,
    skip: int = 0,
    below: float = float("inf"),
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Similarity [N, m] of each query to its hardest columns, hardest first, and their numbers, int64 [N, m].

    q_ND: unit rows, N a multiple of B; query i belongs to key i mod B, which is left out. k_BD: unit rows, without
    gradient. below: columns at least so similar are left out; skip: then so many of the hardest. Of equal ones the
    lower number comes first: keys in the order of the ranks, then negatives. Where there are fewer than m, similarity
    is -inf and the number -1. The gradient goes to the queries only.
    Similarities are of vectors rounded to the type of the negatives' rows.
    """
    similarity_Nm, number_Nm = _Mine.apply(q_ND, k_BD, negatives, m, skip, below, kernels)
    return similarity_Nm, number_Nm


class _Mine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_ND: Tensor,
        k_BD: Tensor,
        negatives: Bank | Queue | None,
        m: int,
        skip: int,
        below: float,
        kernels: str,
    ) -> tuple[Tensor, Tensor]:
        world_size, batch, num_queries = dist.get_world_size(), len(k_BD), len(q_ND)
        row, replicas = everyone(), None
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
        # Which of all columns this rank's are: those of rank r's keys begin at r * batch.
        rank_of_M = torch.arange(world_size // shards, device=q_ND.device).repeat_interleave(batch) * shards + shard
        number_M = rank_of_M * batch + torch.arange(len(k_MD), device=q_ND.device) % batch
        blocks: list[tuple[Tensor, Tensor | None, Tensor]] = [(k_MD, own_A, number_M)]
        if negatives is not None and len(negatives.n_KD):
            number_K = torch.arange(len(negatives.n_KD), device=q_ND.device) + world_size * batch + negatives.first
            blocks.append((negatives.n_KD, None, number_K))

        similarities, numbers, columns = [], [], []
        for c_CD, own, number_C in blocks:
            found = kernel_functions.hardest(all_q_AD, c_CD, own, m + skip, below, kernels=kernels)
            similarities.append(found.similarity_Nm)
            numbers.append(number_C[found.column_Nm].masked_fill(found.column_Nm < 0, torch.iinfo(torch.int64).max))
            columns.append(found.column_Nm)
        similarity_NC = _to_owners(torch.cat(similarities, 1), row)
        number_NC = _to_owners(torch.cat(numbers, 1), row)
        by_number_NC = number_NC.argsort(1)
        order_NC = similarity_NC.gather(1, by_number_NC).argsort(dim=1, descending=True, stable=True)
        slot_Nm = by_number_NC.gather(1, order_NC)[:, skip : skip + m]
        similarity_Nm = similarity_NC.gather(1, slot_Nm)
        number_Nm = number_NC.gather(1, slot_Nm).masked_fill(similarity_Nm == -torch.inf, -1)

        ctx.save_for_backward(slot_Nm, *columns, *(c_CD for c_CD, _, _ in blocks))
        ctx.row, ctx.given, ctx.candidates = row, q_ND.dtype, similarity_NC.shape[1]
        ctx.mark_non_differentiable(number_Nm)
        return similarity_Nm, number_Nm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slot_Nm, *rest = ctx.saved_tensors
        columns, blocks = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        grad_NC = grads[0].new_zeros(len(slot_Nm), ctx.candidates).scatter_(1, slot_Nm, grads[0])
        parts = _from_owners(grad_NC, ctx.row).chunk(len(blocks), 1)
        dq_AD = torch.stack([_weigh(p, column, c) for p, column, c in zip(parts, columns, blocks, strict=True)]).sum(0)
        if ctx.row.size() > 1:
            dq_ND = dq_AD.new_empty(len(slot_Nm), dq_AD.shape[1])
            dist.reduce_scatter_single(dq_ND, dq_AD, group=ctx.row)
            dq_AD = dq_ND
        return dq_AD.to(ctx.given), None, None, None, None, None, None


def _to_owners(x_AC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """What each rank of the row says of all queries, to the queries' owners: [A, C] to [N, S * C]."""
    shards = row.size()
    if shards == 1:
        return x_AC
    received_SNC = torch.empty_like(x_AC).view(shards, -1, x_AC.shape[1])
    dist.all_to_all_single(received_SNC, x_AC.contiguous(), group=row)
    return rearrange(received_SNC, "s n c -> n (s c)")


def _from_owners(x_NC: Tensor, row: dist.ProcessGroup) -> Tensor:
    """The inverse of `_to_owners`."""
    shards = row.size()
    if shards == 1:
        return x_NC
    sent_SNC = rearrange(x_NC, "n (s c) -> s n c", s=shards).contiguous()
    received_SNC = torch.empty_like(sent_SNC)
    dist.all_to_all_single(received_SNC, sent_SNC, group=row)
    return rearrange(received_SNC, "s n c -> (s n) c")


def _weigh(weight_AC: Tensor, column_AC: Tensor, c_KD: Tensor) -> Tensor:
    """sum_c weight_ac c_{column_ac}, [A, D]; columns of -1 have weight 0."""
    return torch.cat(
        [
            torch.einsum("ac,acd->ad", weight, c_KD[column.clamp(min=0)].to(weight.dtype))
            for weight, column in zip(weight_AC.split(_ROWS), column_AC.split(_ROWS), strict=True)
        ]
    )
