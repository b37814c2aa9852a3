"""`score` in Triton: one pass over tiles of the similarities, of which nothing is stored.

A program holds a tile of queries and walks over one part ("split") of the columns, as flash attention walks over
keys (arXiv 2205.14135), but without a running maximum: unit vectors bound every exponent. Each split writes its
partial sums, and these are added in a fixed order, so that results repeat bit for bit. Batch keys and negatives are
two launches of one kernel.

N queries, M keys, K negatives, D dimensions, C columns (keys or negatives), S splits; in the kernel B queries and
T columns of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import Score, check_score
from kernels.tiles import architecture, check, num_splits, products, tiles

_LOG2_E = math.log2(math.e)


@triton.jit
def score_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    c_ptr,
    own_ptr,
    z_ptr,
    o_ptr,
    za_ptr,
    top_ptr,
    num_queries,
    num_columns,
    tiles_per_split,
    scale,
    scale_a,
    D: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    HAS_OWN: tl.constexpr,
    SIXTH_POWER: tl.constexpr,
    RAGGED: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of one tile of queries over one split of the columns.

    q [N, D], c [C, D], own [N] int64 (read if HAS_OWN); z, za, top [S, N] and o [S, N, D] fp32, written.
    scale, scale_a: log2(e) / T and / T_a. SIXTH_POWER: T / T_a is 6. RAGGED: T does not divide C.
    """
    split = tl.program_id(1)
    rows_B = tl.program_id(0) * B + tl.arange(0, B)
    inside_B = rows_B < num_queries
    dims_D = tl.arange(0, D)
    columns_T = tl.arange(0, T)
    offsets_BD = rows_B.to(tl.int64)[:, None] * D + dims_D[None, :]
    offsets_TD = columns_T[:, None] * D + dims_D[None, :]
    q_BD = tl.load(q_ptr + offsets_BD, mask=inside_B[:, None], other=0.0).to(SIMILARITY)
    if HAS_OWN:
        own_B = tl.load(own_ptr + rows_B, mask=inside_B, other=-1).to(tl.int32)

    z_B = tl.zeros([B], tl.float32)
    za_B = tl.zeros([B], tl.float32)
    top_B = tl.full([B], float("-inf"), tl.float32)
    o_BD = tl.zeros([B, D], tl.float32)
    first = split * tiles_per_split * T
    last = tl.minimum(first + tiles_per_split * T, num_columns)
    for start in range(first, last, T):
        index_T = start + columns_T
        tile_ptr = c_ptr + tl.cast(start, tl.int64) * D
        if RAGGED:
            c_TD = tl.load(tile_ptr + offsets_TD, mask=(index_T < num_columns)[:, None], other=0.0)
        else:
            c_TD = tl.load(tile_ptr + offsets_TD)
        s_BT = tl.dot(q_BD, tl.trans(c_TD.to(SIMILARITY)), input_precision=PRECISION)
        e_BT = tl.exp2(s_BT * scale)
        if SIXTH_POWER:
            cube_BT = e_BT * e_BT * e_BT
            ea_BT = cube_BT * cube_BT
        else:
            ea_BT = tl.exp2(s_BT * scale_a)
        if RAGGED:
            is_column_1T = (index_T < num_columns)[None, :]
            e_BT = tl.where(is_column_1T, e_BT, 0.0)
            ea_BT = tl.where(is_column_1T, ea_BT, 0.0)
            s_BT = tl.where(is_column_1T, s_BT, float("-inf"))
        if HAS_OWN:
            s_BT = tl.where(own_B[:, None] == index_T[None, :], float("-inf"), s_BT)
        z_B += tl.sum(e_BT, 1)
        za_B += tl.sum(ea_BT, 1)
        top_B = tl.maximum(top_B, tl.max(s_BT, 1))
        o_BD = tl.dot(e_BT.to(WEIGHTED), c_TD.to(WEIGHTED), o_BD, input_precision=PRECISION)

    partial = split.to(tl.int64) * num_queries
    tl.store(z_ptr + partial + rows_B, z_B, mask=inside_B)
    tl.store(za_ptr + partial + rows_B, za_B, mask=inside_B)
    tl.store(top_ptr + partial + rows_B, top_B, mask=inside_B)
    tl.store(o_ptr + partial * D + offsets_BD, o_BD, mask=inside_B[:, None])


def score(
    q_ND: Tensor,
    k_MD: Tensor,
    own_N: Tensor | None,
    n_KD: Tensor,
    temperature: float,
    adversary_temperature: float,
) -> Score:
    """As `reference.score`, for bf16, fp16 and fp32 on a CUDA device and D of `tiles.DIMS`; results are fp32.

    Raises ValueError where shapes, types or the device do not fit.
    """
    check_score(q_ND, k_MD, own_N, n_KD)
    check("score", q_ND)
    num_queries, dim = q_ND.shape
    tile = tiles("score", architecture(q_ND.device), dim, q_ND.dtype)
    row_tiles = triton.cdiv(num_queries, tile.rows)
    q_ND = q_ND.contiguous()
    # Per launch: the columns, which of them are own keys, into how many splits they are cut.
    launches = []
    for c_CD, own in ((k_MD, own_N), (n_KD, None)):
        if len(c_CD) > 0:
            splits = num_splits(row_tiles, triton.cdiv(len(c_CD), tile.columns), q_ND.device)
            launches.append((c_CD.contiguous(), own, splits))

    # Filled, so that they hold where there are no columns at all; otherwise every element is written.
    total = max(1, sum(splits for _, _, splits in launches))
    sums_2SN = q_ND.new_zeros(2, total, num_queries, dtype=torch.float32)
    top_SN = torch.full_like(sums_2SN[0], float("-inf"))
    o_SND = q_ND.new_zeros(total, num_queries, dim, dtype=torch.float32)
    similarity, weighted, precision = products(q_ND.dtype)
    done = 0
    for c_CD, own, splits in launches:
        part = slice(done, done + splits)
        done += splits
        score_kernel[(row_tiles, splits)](
            q_ND,
            c_CD,
            None if own is None else own.contiguous(),
            sums_2SN[0, part],
            o_SND[part],
            sums_2SN[1, part],
            top_SN[part],
            num_queries,
            len(c_CD),
            triton.cdiv(triton.cdiv(len(c_CD), tile.columns), splits),
            _LOG2_E / temperature,
            _LOG2_E / adversary_temperature,
            D=dim,
            B=tile.rows,
            T=tile.columns,
            HAS_OWN=own is not None,
            SIXTH_POWER=abs(temperature / adversary_temperature - 6) < 1e-6,
            RAGGED=len(c_CD) % tile.columns != 0,
            SIMILARITY=similarity,
            WEIGHTED=weighted,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return Score(z_N=sums_2SN[0].sum(0), o_ND=o_SND.sum(0), za_N=sums_2SN[1].sum(0), top_N=top_SN.amax(0))
