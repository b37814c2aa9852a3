"""`hardest` in Triton: one pass over tiles of the similarities, which keeps the best m columns of each query.

A program keeps a tile of queries with their best columns so far and loops over one split of the columns. Each kept
column is a 64-bit number, the similarity in the upper half and the column's index in the lower half, so one comparison
also breaks ties in favour of the lower index. While any element of a tile is better than its row's worst kept column,
each row replaces its worst kept column by its best new one; after the first tiles this is rare. The splits' best
columns are merged afterwards. Results are deterministic to the bit.

Shape suffixes: N queries, C columns, D dimensions, S splits; in the kernel B queries and T columns of a tile, P kept
columns (m rounded up to a power of two, at least 16).
"""

import math

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from kernels.contract import Hardest, check_hardest
from kernels.triton.tiles import architecture, check, num_splits, products, tiles

# Limits of the columns kept for each query, in registers; keeping fewer than the minimum saves nothing.
_MAX_KEPT = 128
_MIN_KEPT = 16


@triton.jit
def hardest_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    c_ptr,
    own_ptr,
    kept_ptr,
    num_queries,
    num_columns,
    tiles_per_split,
    below,
    D: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    HAS_OWN: tl.constexpr,
    SIMILARITY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the best P columns of one tile of queries in one split of the columns, in no order.

    Tensors: q [N, D], c [C, D], own int64 [N] (read if HAS_OWN); kept int64 [S, N, P] is written, with `_ordered` of
    the similarity in the upper half and 0xFFFFFFFF - column in the lower half. SIMILARITY and PRECISION are those of
    `tiles.Products`.
    """
    split = tl.program_id(1)
    rows_B = tl.program_id(0) * B + tl.arange(0, B)
    inside_B = rows_B < num_queries
    dims_D = tl.arange(0, D)
    columns_T = tl.arange(0, T)
    slots_P = tl.arange(0, P)
    offsets_BD = rows_B.to(tl.int64)[:, None] * D + dims_D[None, :]
    offsets_TD = columns_T[:, None] * D + dims_D[None, :]
    q_BD = tl.load(q_ptr + offsets_BD, mask=inside_B[:, None], other=0.0).to(SIMILARITY)
    if HAS_OWN:
        own_B = tl.load(own_ptr + rows_B, mask=inside_B, other=-1).to(tl.int32)

    # Starts with similarity -inf and distinct columns that do not exist, so that each is the worst once.
    kept_BP = tl.zeros([B, P], tl.int64) + (-0x7F800001 << 32) + slots_P[None, :]
    worst_B = tl.min(kept_BP, 1)
    first = split * tiles_per_split * T
    last = tl.minimum(first + tiles_per_split * T, num_columns)
    for start in range(first, last, T):
        index_T = start + columns_T
        is_column_T = index_T < num_columns
        c_TD = tl.load(c_ptr + tl.cast(start, tl.int64) * D + offsets_TD, mask=is_column_T[:, None], other=0.0)
        s_BT = tl.dot(q_BD, tl.trans(c_TD.to(SIMILARITY)), input_precision=PRECISION)
        # Few tiles have a better element, and only these need their masks. Without the `if`, the `while` would also
        # prevent the compiler from loading tiles ahead.
        if tl.max((_ordered(tl.max(s_BT, 1)) > worst_B >> 32).to(tl.int32), 0) != 0:
            counts_BT = is_column_T[None, :] & (s_BT < below)
            if HAS_OWN:
                counts_BT = counts_BT & (own_B[:, None] != index_T[None, :])
            s_BT = tl.where(counts_BT, s_BT, float("-inf"))
            best_B = tl.max(s_BT, 1)
            while tl.max((_ordered(best_B) > worst_B >> 32).to(tl.int32), 0) != 0:
                column_B = tl.min(tl.where(s_BT == best_B[:, None], index_T[None, :], 0x7FFFFFFF), 1)
                ordered_B = _ordered(best_B)
                new_B = (ordered_B << 32) + (0xFFFFFFFF - column_B.to(tl.int64))
                new_B = tl.where(ordered_B > worst_B >> 32, new_B, worst_B)
                kept_BP = tl.where(kept_BP == worst_B[:, None], new_B[:, None], kept_BP)
                worst_B = tl.min(kept_BP, 1)
                s_BT = tl.where(index_T[None, :] == column_B[:, None], float("-inf"), s_BT)
                best_B = tl.max(s_BT, 1)

    kept_ptr += split.to(tl.int64) * num_queries * P
    offsets_BP = rows_B.to(tl.int64)[:, None] * P + slots_P[None, :]
    tl.store(kept_ptr + offsets_BP, kept_BP, mask=inside_B[:, None])


@triton.jit
def _ordered(s):  # type: ignore[no-untyped-def]
    """Map fp32 numbers to int64 numbers of 32 bits in the same order."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, to which it is equal
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


def hardest(q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, below: float | None = None) -> Hardest:
    """Compute `reference.hardest`, for the queries that `tiles.unsupported` accepts and m up to 128.

    Raises:
        ValueError: If shapes, dtypes, memory layouts, m or the device do not fit.
    """
    check_hardest(q_ND, c_CD, own_N, m)
    check("hardest", q_ND)
    if m > _MAX_KEPT:
        raise ValueError(f"hardest: got m = {m}, the triton kernel keeps at most {_MAX_KEPT}")
    num_queries, dim = q_ND.shape
    tile = tiles("hardest", architecture(q_ND.device), dim, q_ND.dtype)
    row_tiles, column_tiles = triton.cdiv(num_queries, tile.rows), triton.cdiv(len(c_CD), tile.columns)
    splits = num_splits(row_tiles, max(1, column_tiles), q_ND.device)
    kept = max(_MIN_KEPT, triton.next_power_of_2(m))
    kept_SNP = q_ND.new_empty(splits, num_queries, kept, dtype=torch.int64)
    if num_queries > 0:
        similarity, _, precision = products(q_ND.dtype, dim, sums=False)
        hardest_kernel[(row_tiles, splits)](
            q_ND, c_CD, own_N, kept_SNP, num_queries, len(c_CD), triton.cdiv(column_tiles, splits),
            math.inf if below is None else below,
            D=dim, B=tile.rows, T=tile.columns, P=kept, HAS_OWN=own_N is not None,
            SIMILARITY=similarity, PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    best_Nm = rearrange(kept_SNP, "s n p -> n (s p)").topk(m).values  # all numbers differ, so there are no ties
    ordered_Nm = (best_Nm >> 32).int()
    similarity_Nm = (ordered_Nm ^ ((ordered_Nm >> 31) & 0x7FFFFFFF)).view(torch.float32)
    column_Nm = 0xFFFFFFFF - (best_Nm & 0xFFFFFFFF)
    return Hardest(similarity_Nm, column_Nm.masked_fill(similarity_Nm == float("-inf"), -1))
