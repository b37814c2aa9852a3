"""`score` in Triton: one pass over tiles of the similarities, which are not stored.

A program keeps a tile of queries and loops over one split of the columns, as flash attention loops over keys (arXiv
2205.14135), but without a running maximum, because unit vectors bound every exponent. The columns are the tiles of the
keys followed by those of the negatives, in one launch; a split is a range of these tiles and may contain both. Each
split writes partial sums, which are added in a fixed order, so results are deterministic to the bit.

Shape suffixes: N queries, M keys, K negatives, D dimensions, S splits; in the kernel B queries and T columns of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import Score, check_score
from kernels.triton.tiles import architecture, check, num_splits, products, tiles

_LOG2_E = math.log2(math.e)


@triton.jit
def _add_tile(  # type: ignore[no-untyped-def]
    q_BD,
    own_B,
    c_ptr,
    start,
    num_columns,
    z_B,
    za_B,
    top_B,
    o_BD,
    scale,
    scale_a,
    D: tl.constexpr,
    T: tl.constexpr,
    HAS_OWN: tl.constexpr,
    POWER: tl.constexpr,
    RAGGED: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the T columns from index `start` on to the sums and maxima. RAGGED: T does not divide num_columns."""
    columns_T = tl.arange(0, T)
    index_T = start + columns_T
    tile_ptr = c_ptr + tl.cast(start, tl.int64) * D
    offsets_TD = columns_T[:, None] * D + tl.arange(0, D)[None, :]
    if RAGGED:
        c_TD = tl.load(tile_ptr + offsets_TD, mask=(index_T < num_columns)[:, None], other=0.0)
    else:
        c_TD = tl.load(tile_ptr + offsets_TD)
    s_BT = tl.dot(q_BD, tl.trans(c_TD.to(SIMILARITY)), input_precision=PRECISION)
    e_BT = tl.exp2(s_BT * scale)
    if POWER == 1:
        ea_BT = e_BT
    elif POWER == 6:
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
    return z_B, za_B, top_B, o_BD


@triton.jit
def score_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    own_ptr,
    n_ptr,
    z_ptr,
    o_ptr,
    za_ptr,
    top_ptr,
    num_queries,
    num_keys,
    num_negatives,
    tiles_per_split,
    scale,
    scale_a,
    D: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_NEGATIVES: tl.constexpr,
    POWER: tl.constexpr,
    RAGGED_KEYS: tl.constexpr,
    RAGGED_NEGATIVES: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the partial sums of one tile of queries over one split of the columns.

    Tensors: q [N, D], k [M, D], own int64 [N] (read if HAS_OWN), n [K, D]; z, za and top fp32 [S, N] and o fp32
    [S, N, D] are written. scale and scale_a are log2(e) / T and log2(e) / T_a. POWER is the ratio T / T_a if
    it is 1 (without an adversary) or 6 (published for AdCo), so that the adversary's exponential is a power of the
    encoder's, and 0 for others. RAGGED_KEYS, RAGGED_NEGATIVES: T does not divide M, K. SIMILARITY, WEIGHTED and
    PRECISION are those of `tiles.Products`.
    """
    split = tl.program_id(1)
    rows_B = tl.program_id(0) * B + tl.arange(0, B)
    inside_B = rows_B < num_queries
    offsets_BD = rows_B.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    q_BD = tl.load(q_ptr + offsets_BD, mask=inside_B[:, None], other=0.0).to(SIMILARITY)
    own_B = rows_B
    if HAS_OWN:
        own_B = tl.load(own_ptr + rows_B, mask=inside_B, other=-1).to(tl.int32)

    z_B = tl.zeros([B], tl.float32)
    za_B = tl.zeros([B], tl.float32)
    top_B = tl.full([B], float("-inf"), tl.float32)
    o_BD = tl.zeros([B, D], tl.float32)
    key_tiles = tl.cdiv(num_keys, T)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, key_tiles + tl.cdiv(num_negatives, T))
    if HAS_KEYS:
        for start in range(first * T, tl.minimum(last, key_tiles) * T, T):
            z_B, za_B, top_B, o_BD = _add_tile(
                q_BD, own_B, k_ptr, start, num_keys, z_B, za_B, top_B, o_BD, scale, scale_a,
                D, T, HAS_OWN, POWER, RAGGED_KEYS, SIMILARITY, WEIGHTED, PRECISION,
            )  # fmt: skip
    if HAS_NEGATIVES:
        for start in range(tl.maximum(first - key_tiles, 0) * T, (last - key_tiles) * T, T):
            z_B, za_B, top_B, o_BD = _add_tile(
                q_BD, own_B, n_ptr, start, num_negatives, z_B, za_B, top_B, o_BD, scale, scale_a,
                D, T, False, POWER, RAGGED_NEGATIVES, SIMILARITY, WEIGHTED, PRECISION,
            )  # fmt: skip

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
    """Compute `reference.score`, for the queries that `tiles.unsupported` accepts; results are fp32.

    Raises:
        ValueError: If shapes, dtypes, memory layouts or the device do not fit.
    """
    check_score(q_ND, k_MD, own_N, n_KD)
    check("score", q_ND)
    num_queries, dim = q_ND.shape
    tile = tiles("score", architecture(q_ND.device), dim, q_ND.dtype)
    row_tiles = triton.cdiv(num_queries, tile.rows)
    column_tiles = triton.cdiv(len(k_MD), tile.columns) + triton.cdiv(len(n_KD), tile.columns)
    tiles_per_split = triton.cdiv(column_tiles, num_splits(row_tiles, column_tiles, q_ND.device))
    splits = triton.cdiv(column_tiles, tiles_per_split)
    z_SN, za_SN, top_SN = (q_ND.new_empty(splits, num_queries, dtype=torch.float32) for _ in range(3))
    o_SND = q_ND.new_empty(splits, num_queries, dim, dtype=torch.float32)
    similarity, weighted, precision = products(q_ND.dtype, dim)
    if num_queries > 0:
        score_kernel[(row_tiles, splits)](
            q_ND, k_MD, own_N, n_KD, z_SN, o_SND, za_SN, top_SN, num_queries, len(k_MD), len(n_KD), tiles_per_split,
            _LOG2_E / temperature, _LOG2_E / adversary_temperature,
            D=dim, B=tile.rows, T=tile.columns,
            HAS_KEYS=len(k_MD) > 0, HAS_OWN=own_N is not None, HAS_NEGATIVES=len(n_KD) > 0,
            POWER=next((x for x in (1, 6) if abs(temperature / adversary_temperature - x) < 1e-6), 0),
            RAGGED_KEYS=len(k_MD) % tile.columns != 0, RAGGED_NEGATIVES=len(n_KD) % tile.columns != 0,
            SIMILARITY=similarity, WEIGHTED=weighted, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Score(z_N=z_SN.sum(0), o_ND=o_SND.sum(0), za_N=za_SN.sum(0), top_N=top_SN.amax(0))
