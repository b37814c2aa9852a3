"""The kernels in plain PyTorch, tiled over the columns: the fast path on a CPU.

Each tile of N x T similarities is computed in one buffer that stays in the processor's cache and is overwritten by the
next tile, so no N x K tensor exists. Results equal those of `kernels.reference` up to rounding.

Shape suffixes: N queries, M keys, K negatives, C columns (keys or negatives), D dimensions, T columns of a tile. In
`hardest` also m best columns, E elements of a tile that are better, B blocks of W columns, F blocks with a better
element, X best and better columns together.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import (
    AdversaryParams,
    AdversaryStats,
    Hardest,
    Score,
    check_adversary,
    check_hardest,
    check_score,
)
from kernels.rounding import random_bits, round_to_bf16

# Columns of a tile. Measured on 2 cores at N = 1024, D = 128 (docs/bench/README.md): smaller tiles pay for starting
# operations, wider ones do not fit into the cache.
_TILE = 1024

# `hardest` looks at single elements only in blocks of this many columns whose maximum is large enough.
_BLOCK = 64

# Computes e^x as 2^(x log2 e): torch.exp2 takes a third of torch.exp's time on a CPU, and the factor costs nothing.
_LOG2_E = math.log2(math.e)


def score(
    q_ND: Tensor,
    k_MD: Tensor,
    own_N: Tensor | None,
    n_KD: Tensor,
    temperature: float,
    adversary_temperature: float,
) -> Score:
    """Compute `reference.score`, in fp32 or the input's dtype if that is wider."""
    check_score(q_ND, k_MD, own_N, n_KD)
    num_queries, dim = q_ND.shape
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    scaled_ND = q_ND.to(wide) * (_LOG2_E / temperature)
    z_N = q_ND.new_zeros(num_queries, dtype=wide)
    o_ND = q_ND.new_zeros(num_queries, dim, dtype=wide)
    za_N = torch.zeros_like(z_N)
    top_N = torch.zeros_like(z_N)  # maximum of the exponentials; the logarithm is taken at the end
    ratio = temperature / adversary_temperature
    buffer = q_ND.new_empty(num_queries * _TILE, dtype=wide)

    def add_columns(c_TD: Tensor, own_N: Tensor | None) -> None:
        c_TD = c_TD.to(wide)
        e_NT = buffer[: num_queries * len(c_TD)].view(num_queries, len(c_TD))
        torch.mm(scaled_ND, c_TD.T, out=e_NT).exp2_()
        sum_N = e_NT.sum(1)
        z_N.add_(sum_N)
        o_ND.addmm_(e_NT, c_TD)
        rival_NT = e_NT
        if own_N is not None:
            columns_T = torch.arange(len(c_TD), device=c_TD.device)
            rival_NT = e_NT.masked_fill(own_N[:, None] == columns_T, 0)
        torch.maximum(top_N, rival_NT.amax(1), out=top_N)
        if ratio == 1:  # negatives without an adversary
            za_N.add_(sum_N)
        elif abs(ratio - 6) < 1e-6:  # the published pair .12 and .02: the sixth power is cheaper than an exponential
            za_N.add_(torch.linalg.vector_norm(e_NT.pow_(3), dim=1).square_())
        else:
            za_N.add_(e_NT.log2_().mul_(ratio).exp2_().sum(1))

    for start in range(0, len(k_MD), _TILE):
        add_columns(k_MD[start : start + _TILE], None if own_N is None else own_N - start)
    for start in range(0, len(n_KD), _TILE):
        add_columns(n_KD[start : start + _TILE], None)
    return Score(z_N=z_N, o_ND=o_ND, za_N=za_N, top_N=top_N.log_() * temperature)


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
    """Take the step of `reference.adversary_step`; the gradient exists for one tile of negatives at a time."""
    check_adversary(q_ND, coef_N, n_KD, w_KD, v_KD, skip)
    if skip is not None and skip.is_cpu and not skip:  # the host may read it there, and no tile needs a copy
        skip = None
    temperature, lr, momentum, weight_decay = params
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    q_ND = q_ND.to(wide)
    scaled_ND = q_ND * (_LOG2_E / temperature)
    log_coef_1N = coef_N.to(wide).log2()[None]  # costs no extra pass inside the exponential
    mass_K = q_ND.new_empty(len(w_KD))
    grad_K = torch.empty_like(mass_K)
    # Allocated once: memory that is freed after every tile would come back from the system page by page.
    similarities = q_ND.new_empty(_TILE, len(q_ND))
    gradients = q_ND.new_empty(_TILE, q_ND.shape[1])
    products = torch.empty_like(gradients)
    for start in range(0, len(w_KD), _TILE):
        tile = slice(start, start + _TILE)
        n_TD, stored_w_TD = n_KD[tile], w_KD[tile]
        size = len(n_TD)
        stored = [] if skip is None else [x_KD[tile] for x_KD in (n_KD, w_KD, v_KD) if x_KD is not None]
        before = [x_TD.clone() for x_TD in stored]
        w_TD = stored_w_TD.to(wide)  # no copy if the stored weights have this dtype: they are then updated in place
        p_TN = torch.addmm(log_coef_1N, n_TD.to(wide), scaled_ND.T, out=similarities[:size]).exp2_()
        g_TD = torch.mm(p_TN, q_ND, out=gradients[:size])
        norm_T1 = torch.linalg.vector_norm(w_TD, dim=1, keepdim=True)
        # G's component along W, (G . W) W / |W|^2, equals its component along the unit row.
        radial_T1 = torch.mul(g_TD, w_TD, out=products[:size]).sum(1, keepdim=True).div_(norm_T1.square())
        grad_TD = g_TD.addcmul_(radial_T1, w_TD, value=-1).div_(temperature * norm_T1)
        mass_K[tile] = p_TN.sum(1)
        grad_K[tile] = torch.linalg.vector_norm(grad_TD, dim=1)
        bits_TD = None
        if torch.bfloat16 in (w_KD.dtype, None if v_KD is None else v_KD.dtype):
            bits_TD = random_bits(seed, first + start, size, w_KD.shape[1], w_KD.device)
        if v_KD is None:
            v_TD = grad_TD.neg_().add_(w_TD, alpha=weight_decay)
        else:
            v_TD = v_KD[tile].to(wide).mul_(momentum).sub_(grad_TD).add_(w_TD, alpha=weight_decay)
            if v_KD.dtype == torch.bfloat16:
                assert bits_TD is not None
                v_KD[tile] = round_to_bf16(v_TD.float(), bits_TD >> 16)
        w_TD.sub_(torch.mul(v_TD, lr, out=products[:size]))
        if w_KD.dtype == torch.bfloat16:
            assert bits_TD is not None
            w_TD = stored_w_TD.copy_(round_to_bf16(w_TD.float(), bits_TD)).to(wide)
        torch.div(w_TD, torch.linalg.vector_norm(w_TD, dim=1, keepdim=True), out=products[:size])
        n_TD.copy_(products[:size])
        for x_TD, old_TD in zip(stored, before, strict=True):
            assert skip is not None
            x_TD.copy_(torch.where(skip, old_TD, x_TD))
    if skip is not None:
        mass_K, grad_K = mass_K.masked_fill(skip, 0), grad_K.masked_fill(skip, 0)
    return AdversaryStats(mass_K=mass_K, grad_K=grad_K)


def hardest(q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, below: float | None = None) -> Hardest:
    """Compute `reference.hardest`. Columns that are worse than the best so far cost little more than their product.

    The best are merged by stable sorts with the lower columns in front, which breaks ties as the reference does.
    """
    check_hardest(q_ND, c_CD, own_N, m)
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    q_ND = q_ND.to(wide)
    num_queries, minus_inf = len(q_ND), float("-inf")
    best_Nm = q_ND.new_full((num_queries, m), minus_inf)
    column_Nm = torch.full_like(best_Nm, -1, dtype=torch.int64)
    buffer = q_ND.new_empty(num_queries * -(-_TILE // _BLOCK) * _BLOCK)
    for start in range(0, len(c_CD), _TILE):
        c_TD = c_CD[start : start + _TILE].to(wide)
        width = -(-len(c_TD) // _BLOCK) * _BLOCK
        s_NT = buffer[: num_queries * width].view(num_queries, width)
        torch.mm(q_ND, c_TD.T, out=s_NT[:, : len(c_TD)])
        s_NT[:, len(c_TD) :] = minus_inf
        if below is not None:
            s_NT.masked_fill_(s_NT >= below, minus_inf)
        if own_N is not None:
            (row_O,) = ((own_N >= start) & (own_N < start + len(c_TD))).nonzero(as_tuple=True)
            s_NT[row_O, own_N[row_O] - start] = minus_inf

        # Later columns must be better than the last of the best; those of the first tile may equal its m-th.
        bound_N1 = best_Nm[:, -1:]
        if start == 0 and m <= width:
            bound_N1 = s_NT.topk(m).values[:, -1:]
            bound_N1 = torch.nextafter(bound_N1, torch.full_like(bound_N1, minus_inf))
        row_E, tile_column_E = _better(s_NT, bound_N1)
        if len(row_E) == 0:
            continue
        count_N = row_E.bincount(minlength=num_queries)
        slot_E = m + torch.arange(len(row_E), device=row_E.device) - (count_N.cumsum(0) - count_N)[row_E]
        added = int(count_N.max())
        merged_NX = F.pad(best_Nm, (0, added), value=minus_inf)
        merged_column_NX = F.pad(column_Nm, (0, added), value=-1)
        merged_NX[row_E, slot_E] = s_NT[row_E, tile_column_E]
        merged_column_NX[row_E, slot_E] = start + tile_column_E
        sorted_NX, order_NX = merged_NX.sort(dim=1, descending=True, stable=True)
        best_Nm, column_Nm = sorted_NX[:, :m], merged_column_NX.gather(1, order_NX[:, :m])
    return Hardest(best_Nm.contiguous(), column_Nm)


def _better(s_NT: Tensor, bound_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Find the E elements above their row's bound, row by row; T is a multiple of _BLOCK.

    Returns:
        Row and column indices of the elements, both int64 [E].
    """
    s_NBW = s_NT.view(len(s_NT), s_NT.shape[1] // _BLOCK, _BLOCK)
    row_F, block_F = (s_NBW.amax(2) > bound_N1).nonzero(as_tuple=True)
    index_E, within_E = (s_NBW[row_F, block_F] > bound_N1[row_F]).nonzero(as_tuple=True)
    return row_F[index_E], block_F[index_E] * _BLOCK + within_E
