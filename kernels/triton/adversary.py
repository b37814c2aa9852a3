"""`adversary_step` in Triton: one pass over the negatives, in which each program updates one tile of them.

A program recomputes the similarities of its tile to all queries, keeps the gradient in registers, and updates weights,
velocity and unit rows in place. The gradient is not stored, and no two programs write the same row, so results are
deterministic to the bit.

The gradient fills the registers. The update therefore processes the dimensions in slices, left to right, and reads the
weights twice: once for the gradient's component along them, and once for the update. Slicing the gradient moves no
data.

Shape suffixes: N queries, K negatives, D dimensions; in the kernel B negatives and T queries of a tile, C dimensions of
a slice.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import AdversaryParams, AdversaryStats, as_scalar, check_adversary
from kernels.rounding import COLUMN_STEP
from kernels.triton.tiles import architecture, check, products, tiles

_LOG2_E = math.log2(math.e)
_COLUMN_STEP = tl.constexpr(COLUMN_STEP)
_SLICE = tl.constexpr(32)  # dimensions: 64 would need more registers than there are, 16 more instructions


@triton.jit
def _slices(x_BD):  # type: ignore[no-untyped-def]
    """Split the columns into slices of _SLICE, left to right."""
    if x_BD.shape[1] <= _SLICE:
        return (x_BD,)
    else:
        half: tl.constexpr = x_BD.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(x_BD, (x_BD.shape[0], 2, half)), (0, 2, 1)))
        return _slices(left) + _slices(right)


@triton.jit
def _hash(x):  # type: ignore[no-untyped-def]
    """Compute `kernels.rounding._hash` of uint32."""
    x ^= x >> 16
    x *= tl.full([], 0x7FEB352D, tl.uint32)
    x ^= x >> 15
    x *= tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, bits):  # type: ignore[no-untyped-def]
    """Compute `kernels.rounding.round_to_bf16` of fp32; the result is still fp32."""
    sum_bits = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return tl.where(x == x, (sum_bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)


@triton.jit(do_not_specialize=["first"])
def adversary_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    log_coef_ptr,
    n_ptr,
    w_ptr,
    v_ptr,
    mass_ptr,
    grad_ptr,
    skip_ptr,
    lr_ptr,
    seed_ptr,
    num_queries,
    num_negatives,
    first,
    scale,
    temperature,
    momentum,
    weight_decay,
    D: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    SIMILARITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Update one tile of negatives.

    Tensors: q [N, D] with N > 0 divisible by T, log_coef fp32 [N] (binary logarithms); n [K, D], w and v fp32 or bf16
    [K, D] are read and written, v may be None; mass and grad fp32 [K] are written. lr is a floating and seed an int64
    scalar. first is an int32 that is interpreted as unsigned.
    skip is a uint8 scalar or None: if it is not 0, nothing is written. scale is log2(e) / T_a. SIMILARITY, WEIGHTED and
    PRECISION are those of `tiles.Products`.
    """
    W_ROUNDED: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    V_ROUNDED: tl.constexpr = v_ptr is not None and v_ptr.dtype.element_ty == tl.bfloat16
    start = tl.program_id(0) * B
    rows_B = tl.arange(0, B)
    if skip_ptr is not None:  # noqa: SIM102 (known when it is compiled, the other when it runs)
        if tl.load(skip_ptr) != 0:
            return
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

    # Without this assumption, or with masks on q, ptxas may serialise all products on sm_90 (its remark C7515).
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

    g_slices = _slices(g_BD)
    C: tl.constexpr = g_slices[0].shape[1]
    columns_C = tl.arange(0, C)
    offsets_BC = rows_B[:, None] * D + columns_C[None, :]
    along_B = tl.zeros([B], tl.float32)  # G . W
    square_B = tl.zeros([B], tl.float32)  # |W|^2
    for i in tl.static_range(len(g_slices)):
        w_BC = tl.load(w_ptr + i * C + offsets_BC, mask=inside_B1, other=1.0).to(tl.float32)
        along_B += tl.sum(g_slices[i] * w_BC, 1)
        square_B += tl.sum(w_BC * w_BC, 1)
    along_B1 = (along_B / square_B)[:, None]
    inverse_B1 = (1 / (temperature * tl.sqrt(square_B)))[:, None]
    seed = tl.load(seed_ptr)
    seed = (seed ^ (seed >> 32)).to(tl.uint32)  # as `kernels.rounding.seed32` folds it
    row_bits_B1 = _hash((first.to(tl.uint32) + (start + rows_B).to(tl.uint32)) ^ seed)[:, None]
    column_step = tl.full([], _COLUMN_STEP, tl.uint32)

    # All threads of a program must read before any of them writes, because a thread may store other elements than it
    # loaded.
    tl.debug_barrier()
    lr = tl.load(lr_ptr).to(tl.float32)  # before the barrier it would take a register too many
    square_B = tl.zeros([B], tl.float32)
    grad_square_B = tl.zeros([B], tl.float32)
    w_slices = ()
    for i in tl.static_range(len(g_slices)):
        w_BC = tl.load(w_ptr + i * C + offsets_BC, mask=inside_B1, other=1.0).to(tl.float32)
        grad_BC = (g_slices[i] - along_B1 * w_BC) * inverse_B1
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
        w_slices += (w_BC,)  # type: ignore[assignment]
    inverse_B1 = (1 / tl.sqrt(square_B))[:, None]
    for i in tl.static_range(len(w_slices)):
        n_BC = w_slices[i] * inverse_B1
        tl.store(n_ptr + i * C + offsets_BC, n_BC.to(n_ptr.dtype.element_ty), mask=inside_B1)
    tl.store(mass_ptr + start + rows_B, mass_B, mask=inside_B)
    tl.store(grad_ptr + start + rows_B, tl.sqrt(grad_square_B), mask=inside_B)


def adversary_step(
    q_ND: Tensor,
    coef_N: Tensor,
    n_KD: Tensor,
    w_KD: Tensor,
    v_KD: Tensor | None,
    params: AdversaryParams,
    seed: int | Tensor = 0,
    first: int = 0,
    skip: Tensor | None = None,
) -> AdversaryStats:
    """Take the step of `reference.adversary_step`, for the queries that `tiles.unsupported` accepts.

    Raises:
        ValueError: If shapes, dtypes, memory layouts or the device do not fit.
    """
    check_adversary(q_ND, coef_N, n_KD, w_KD, v_KD, skip)
    check("adversary_step", q_ND)
    num_negatives, dim = w_KD.shape
    tile = tiles("adversary", architecture(q_ND.device), dim, q_ND.dtype)
    similarity, weighted, precision = products(q_ND.dtype, dim)
    # The coefficient costs nothing inside the exponential. Rows that fill up the last tile have weight 2^-inf = 0.
    missing = max(1, triton.cdiv(len(q_ND), tile.columns)) * tile.columns - len(q_ND)
    log_coef_N = F.pad(coef_N.float().log2(), (0, missing), value=-math.inf)
    q_ND = F.pad(q_ND, (0, 0, 0, missing)) if missing else q_ND
    # Zero, because a skipped step writes nothing.
    mass_K, grad_K = (q_ND.new_zeros(num_negatives, dtype=torch.float32) for _ in range(2))
    adversary_kernel[(triton.cdiv(num_negatives, tile.rows),)](
        q_ND, log_coef_N, n_KD, w_KD, v_KD, mass_K, grad_K, None if skip is None else skip.view(torch.uint8),
        as_scalar(params.lr, q_ND.device), as_scalar(seed, q_ND.device),
        len(q_ND), num_negatives,
        _signed(first), _LOG2_E / params.temperature, params.temperature, params.momentum, params.weight_decay,
        D=dim, B=tile.rows, T=tile.columns, SIMILARITY=similarity, WEIGHTED=weighted, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return AdversaryStats(mass_K=mass_K, grad_K=grad_K)


def _signed(x: int) -> int:
    """Return the int32 with the same lowest 32 bits, so that Triton sees one type for all numbers."""
    return (x + 2**31) % 2**32 - 2**31
