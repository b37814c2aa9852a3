"""`adversary_step` in Triton: one pass over the negatives, each program moving a tile of them.

A program recomputes its tile's similarities to all queries, holds the gradient in registers, and updates weights,
velocity and unit rows where they lie. No gradient is stored, and no two programs write the same row: results repeat
bit for bit.

The gradient fills the registers, so the update takes the dimensions in parts, left to right, and looks at the weights
twice: once for the part of the gradient along them, once to move them. Splitting the gradient moves no data.

N queries, K negatives, D dimensions; in the kernel B negatives and T queries of a tile, C dimensions of a part.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import AdversaryStats, check_adversary
from kernels.rounding import COLUMN_STEP, seed32
from kernels.triton.tiles import architecture, check, products, tiles

_LOG2_E = math.log2(math.e)
_COLUMN_STEP = tl.constexpr(COLUMN_STEP)
_PART = tl.constexpr(32)  # dimensions; at 64 the update takes more registers than there are, at 16 more instructions


@triton.jit
def _parts(x_BD):  # type: ignore[no-untyped-def]
    """The columns in parts of _PART, left to right."""
    if x_BD.shape[1] <= _PART:
        return (x_BD,)
    else:
        half: tl.constexpr = x_BD.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(x_BD, (x_BD.shape[0], 2, half)), (0, 2, 1)))
        return _parts(left) + _parts(right)


@triton.jit
def _hash(x):  # type: ignore[no-untyped-def]
    """`kernels.rounding._hash`, of uint32."""
    x ^= x >> 16
    x *= tl.full([], 0x7FEB352D, tl.uint32)
    x ^= x >> 15
    x *= tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, bits):  # type: ignore[no-untyped-def]
    """`kernels.rounding.round_to_bf16` of fp32, still as fp32."""
    x = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return (x & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed", "first"])
def adversary_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    log_coef_ptr,
    n_ptr,
    w_ptr,
    v_ptr,
    mass_ptr,
    grad_ptr,
    num_queries,
    num_negatives,
    seed,
    first,
    scale,
    temperature,
    lr,
    momentum,
    weight_decay,
    D: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The step of one tile of negatives.

    q [N, D], log_coef [N] fp32 to the base 2, T divides N > 0; n [K, D], w and v [K, D] fp32 or bf16, read
    and written, v or None; mass, grad [K] fp32, written. seed, first: int32, taken as unsigned. scale: log2(e) / T_a.
    """
    W_ROUNDED: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    V_ROUNDED: tl.constexpr = v_ptr is not None and v_ptr.dtype.element_ty == tl.bfloat16
    start = tl.program_id(0) * B
    rows_B = tl.arange(0, B)
    inside_B = start + rows_B < num_negatives
    inside_B1 = inside_B[:, None]
    columns_T = tl.arange(0, T)
    offsets_BD = rows_B[:, None] * D + tl.arange(0, D)[None, :]
    offsets_TD = columns_T[:, None] * D + tl.arange(0, D)[None, :]
    n_ptr += start.to(tl.int64) * D
    w_ptr += start.to(tl.int64) * D
    if v_ptr is not None:
        v_ptr += start.to(tl.int64) * D
    n_BD = tl.load(n_ptr + offsets_BD, mask=inside_B1, other=0.0).to(SIMILARITY)

    # Without this promise, and with masks on q, ptxas may let every single product wait on sm_90 (its remark C7515).
    tl.assume(num_queries > 0)
    mass_B = tl.zeros([B], tl.float32)
    g_BD = tl.zeros([B, D], tl.float32)
    for query in range(0, num_queries, T):
        q_TD = tl.load(q_ptr + tl.cast(query, tl.int64) * D + offsets_TD)
        log_coef_T = tl.load(log_coef_ptr + query + columns_T)
        s_BT = tl.dot(n_BD, tl.trans(q_TD.to(SIMILARITY)), input_precision=PRECISION)
        p_BT = tl.exp2(s_BT * scale + log_coef_T[None, :])
        mass_B += tl.sum(p_BT, 1)
        g_BD = tl.dot(p_BT.to(WEIGHTED), q_TD.to(WEIGHTED), g_BD, input_precision=PRECISION)

    g_parts = _parts(g_BD)
    C: tl.constexpr = g_parts[0].shape[1]
    columns_C = tl.arange(0, C)
    offsets_BC = rows_B[:, None] * D + columns_C[None, :]
    along_B = tl.zeros([B], tl.float32)  # G . W
    square_B = tl.zeros([B], tl.float32)  # |W|^2
    for i in tl.static_range(len(g_parts)):
        w_BC = tl.load(w_ptr + i * C + offsets_BC, mask=inside_B1, other=1.0).to(tl.float32)
        along_B += tl.sum(g_parts[i] * w_BC, 1)
        square_B += tl.sum(w_BC * w_BC, 1)
    along_B1 = (along_B / square_B)[:, None]
    inverse_B1 = (1 / (temperature * tl.sqrt(square_B)))[:, None]
    row_bits_B1 = _hash((first.to(tl.uint32) + (start + rows_B).to(tl.uint32)) ^ seed.to(tl.uint32))[:, None]
    column_step = tl.full([], _COLUMN_STEP, tl.uint32)

    # All threads of a program read before any of them writes: they need not store the elements they loaded.
    tl.debug_barrier()
    square_B = tl.zeros([B], tl.float32)
    grad_square_B = tl.zeros([B], tl.float32)
    w_parts = ()
    for i in tl.static_range(len(g_parts)):
        w_BC = tl.load(w_ptr + i * C + offsets_BC, mask=inside_B1, other=1.0).to(tl.float32)
        grad_BC = (g_parts[i] - along_B1 * w_BC) * inverse_B1
        grad_square_B += tl.sum(grad_BC * grad_BC, 1)
        v_BC = weight_decay * w_BC - grad_BC
        if v_ptr is not None:
            v_BC += momentum * tl.load(v_ptr + i * C + offsets_BC, mask=inside_B1, other=0.0).to(tl.float32)
        tl.debug_barrier()
        bits_BC = _hash(row_bits_B1 + ((columns_C + i * C).to(tl.uint32) * column_step)[None, :])
        if v_ptr is not None:
            stored_v_BC = _rounded(v_BC, bits_BC >> 16) if V_ROUNDED else v_BC
            tl.store(v_ptr + i * C + offsets_BC, stored_v_BC.to(v_ptr.dtype.element_ty), mask=inside_B1)
        w_BC -= lr * v_BC
        if W_ROUNDED:
            w_BC = _rounded(w_BC, bits_BC)
        tl.store(w_ptr + i * C + offsets_BC, w_BC.to(w_ptr.dtype.element_ty), mask=inside_B1)
        square_B += tl.sum(w_BC * w_BC, 1)
        w_parts += (w_BC,)  # type: ignore[assignment]
    inverse_B1 = (1 / tl.sqrt(square_B))[:, None]
    for i in tl.static_range(len(w_parts)):
        n_BC = w_parts[i] * inverse_B1
        tl.store(n_ptr + i * C + offsets_BC, n_BC.to(n_ptr.dtype.element_ty), mask=inside_B1)
    tl.store(mass_ptr + start + rows_B, mass_B, mask=inside_B)
    tl.store(grad_ptr + start + rows_B, tl.sqrt(grad_square_B), mask=inside_B)


def adversary_step(
    q_ND: Tensor,
    coef_N: Tensor,
    n_KD: Tensor,
    w_KD: Tensor,
    v_KD: Tensor | None,
    *,
    temperature: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: int = 0,
    first: int = 0,
) -> AdversaryStats:
    """As `reference.adversary_step`, for q and n of one type of bf16, fp16 and fp32 and D of `tiles.DIMS`.

    Raises ValueError where shapes, types, memory layout or the device do not fit.
    """
    check_adversary(q_ND, coef_N, n_KD, w_KD, v_KD)
    check("adversary_step", q_ND)
    num_negatives, dim = w_KD.shape
    tile = tiles("adversary", architecture(q_ND.device), dim, q_ND.dtype)
    similarity, weighted, precision = products(q_ND.dtype, dim)
    # Inside the exponential the factor costs nothing. Rows that fill the last tile have no weight, 2^-inf.
    missing = max(1, triton.cdiv(len(q_ND), tile.columns)) * tile.columns - len(q_ND)
    log_coef_N = F.pad(coef_N.float().log2(), (0, missing), value=-math.inf)
    q_ND = F.pad(q_ND, (0, 0, 0, missing)) if missing else q_ND
    mass_K = q_ND.new_empty(num_negatives, dtype=torch.float32)
    grad_K = torch.empty_like(mass_K)
    adversary_kernel[(triton.cdiv(num_negatives, tile.rows),)](
        q_ND,
        log_coef_N,
        n_KD,
        w_KD,
        v_KD,
        mass_K,
        grad_K,
        len(q_ND),
        num_negatives,
        _signed(seed32(seed)),
        _signed(first),
        _LOG2_E / temperature,
        temperature,
        lr,
        momentum,
        weight_decay,
        D=dim,
        B=tile.rows,
        T=tile.columns,
        SIMILARITY=similarity,
        WEIGHTED=weighted,
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return AdversaryStats(mass_K=mass_K, grad_K=grad_K)


def _signed(x: int) -> int:
    """The int32 of the same lowest 32 bits, so that Triton takes every number for the same type."""
    return (x + 2**31) % 2**32 - 2**31
