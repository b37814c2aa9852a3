"""`adversary_step` in Triton: one pass over the negatives, each program moving a tile of them.

A program recomputes its tile's similarities to all queries, holds the gradient in registers, and updates weights,
velocity and unit rows where they lie. No gradient is stored, and no two programs write the same row: results repeat
bit for bit.

N queries, K negatives, D dimensions; in the kernel B negatives and T queries of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contract import AdversaryStats
from kernels.tiles import architecture, check, products, tiles

_LOG2_E = math.log2(math.e)


@triton.jit
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

    q [N, D], log_coef [N] fp32 to the base 2; n [K, D], w and v [K, D] fp32, read and written; mass, grad [K] fp32,
    written. scale: log2(e) / temperature.
    """
    first = tl.program_id(0) * B
    rows_B = tl.arange(0, B)
    inside_B = first + rows_B < num_negatives
    inside_B1 = inside_B[:, None]
    dims_D = tl.arange(0, D)
    columns_T = tl.arange(0, T)
    offsets_BD = rows_B[:, None] * D + dims_D[None, :]
    offsets_TD = columns_T[:, None] * D + dims_D[None, :]
    n_ptr += first.to(tl.int64) * D
    w_ptr += first.to(tl.int64) * D
    v_ptr += first.to(tl.int64) * D
    n_BD = tl.load(n_ptr + offsets_BD, mask=inside_B1, other=0.0).to(SIMILARITY)

    mass_B = tl.zeros([B], tl.float32)
    g_BD = tl.zeros([B, D], tl.float32)
    for start in range(0, num_queries, T):
        index_T = start + columns_T
        inside_T = index_T < num_queries
        tile_ptr = q_ptr + tl.cast(start, tl.int64) * D
        q_TD = tl.load(tile_ptr + offsets_TD, mask=inside_T[:, None], other=0.0)
        log_coef_T = tl.load(log_coef_ptr + index_T, mask=inside_T, other=float("-inf"))  # 2^-inf: no weight
        s_BT = tl.dot(n_BD, tl.trans(q_TD.to(SIMILARITY)), input_precision=PRECISION)
        p_BT = tl.exp2(s_BT * scale + log_coef_T[None, :])
        mass_B += tl.sum(p_BT, 1)
        g_BD = tl.dot(p_BT.to(WEIGHTED), q_TD.to(WEIGHTED), g_BD, input_precision=PRECISION)

    n_BD = tl.load(n_ptr + offsets_BD, mask=inside_B1, other=0.0).to(tl.float32)
    g_BD -= tl.sum(g_BD * n_BD, 1)[:, None] * n_BD
    w_BD = tl.load(w_ptr + offsets_BD, mask=inside_B1, other=1.0)
    g_BD /= (temperature * tl.sqrt(tl.sum(w_BD * w_BD, 1)))[:, None]
    grad_B = tl.sqrt(tl.sum(g_BD * g_BD, 1))
    g_BD = weight_decay * w_BD - g_BD
    v_BD = tl.load(v_ptr + offsets_BD, mask=inside_B1, other=0.0) * momentum + g_BD
    tl.debug_barrier()  # all threads have read before any writes: they need not store the elements they loaded
    tl.store(v_ptr + offsets_BD, v_BD, mask=inside_B1)
    w_BD -= lr * v_BD
    tl.store(w_ptr + offsets_BD, w_BD, mask=inside_B1)
    n_BD = w_BD / tl.sqrt(tl.sum(w_BD * w_BD, 1))[:, None]
    tl.store(n_ptr + offsets_BD, n_BD.to(n_ptr.dtype.element_ty), mask=inside_B1)
    tl.store(mass_ptr + first + rows_B, mass_B, mask=inside_B)
    tl.store(grad_ptr + first + rows_B, grad_B, mask=inside_B)


def adversary_step(
    q_ND: Tensor,
    coef_N: Tensor,
    n_KD: Tensor,
    w_KD: Tensor,
    v_KD: Tensor,
    *,
    temperature: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> AdversaryStats:
    """As `reference.adversary_step`, for q and n of one type of bf16, fp16 and fp32 and fp32 weights and velocity.

    Raises ValueError where shapes, types, memory layout or the device do not fit.
    """
    check("adversary_step", q_ND)
    _check_bank(q_ND, coef_N, n_KD, w_KD, v_KD)
    num_negatives, dim = w_KD.shape
    tile = tiles("adversary", architecture(q_ND.device), dim, q_ND.dtype)
    mass_K = w_KD.new_empty(num_negatives)
    grad_K = torch.empty_like(mass_K)
    if num_negatives > 0:  # the last rank's shard may be empty
        similarity, weighted, precision = products(q_ND.dtype)
        adversary_kernel[(triton.cdiv(num_negatives, tile.rows),)](
            q_ND.contiguous(),
            coef_N.float().log2(),  # inside the exponential the factor costs nothing
            n_KD,
            w_KD,
            v_KD,
            mass_K,
            grad_K,
            len(q_ND),
            num_negatives,
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


def _check_bank(q_ND: Tensor, coef_N: Tensor, n_KD: Tensor, w_KD: Tensor, v_KD: Tensor) -> None:
    if not n_KD.shape == w_KD.shape == v_KD.shape or w_KD.shape[1:] != q_ND.shape[1:]:
        shapes = [tuple(t.shape) for t in (q_ND, n_KD, w_KD, v_KD)]
        raise ValueError(f"adversary_step: got q, n, w, v of shape {shapes}, need [N, D] and three of [K, D]")
    if coef_N.shape != q_ND.shape[:1]:
        raise ValueError(f"adversary_step: coef has shape {tuple(coef_N.shape)}, need [{len(q_ND)}]")
    if q_ND.dtype != n_KD.dtype or not w_KD.dtype == v_KD.dtype == torch.float32:
        types = [t.dtype for t in (q_ND, n_KD, w_KD, v_KD)]
        raise ValueError(f"adversary_step: q, n, w, v have types {types}, need q and n the same, w and v float32")
    if not (n_KD.is_contiguous() and w_KD.is_contiguous() and v_KD.is_contiguous()):
        raise ValueError("adversary_step: n, w and v are updated in place and need contiguous memory")
