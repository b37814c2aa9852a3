"""The specification of the kernels: plain PyTorch for any floating dtype, with every tensor materialised.

Half-precision inputs are widened to fp32 first, in which exp(1 / T_a) fits. `kernels.contract` documents the results.
Shape suffixes: N queries, M keys, K negatives, C columns, D dimensions.
"""

import torch
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


def score(
    q_ND: Tensor,
    k_MD: Tensor,
    own_N: Tensor | None,
    n_KD: Tensor,
    temperature: float,
    adversary_temperature: float,
) -> Score:
    """Compute the partition sums of every query over all keys and negatives (AdCo, eq. 2 and 6).

    Args:
        q_ND: Unit queries. Keys and negatives have the same floating dtype.
        k_MD: Unit keys; M may be 0.
        own_N: int64 index in k_MD of each query's own key, -1 if it is not among them; None if no query's key is.
            The own key counts in the sums but not in `top_N`.
        n_KD: Unit negatives; K may be 0 if there are keys.
        temperature: T.
        adversary_temperature: T_a.

    Raises:
        ValueError: If shapes, dtypes or memory layouts do not fit.
    """
    check_score(q_ND, k_MD, own_N, n_KD)
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    c_CD = torch.cat([k_MD, n_KD]).to(wide)
    s_NC = q_ND.to(wide) @ c_CD.T
    e_NC = torch.exp(s_NC / temperature)
    return Score(
        z_N=e_NC.sum(1),
        o_ND=e_NC @ c_CD,
        za_N=torch.exp(s_NC / adversary_temperature).sum(1),
        top_N=_without_own(s_NC, own_N).amax(1),
    )


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
    """Take one step of gradient ascent on the contrastive loss, in place in W, v and n (AdCo, eq. 7).

    With p_ik = w_i exp(q_i . n_k / T_a) / Z^a_i, G_k = sum_i p_ik q_i and u_k = W_k / |W_k|:

        dL/dW_k = (G_k - (G_k . u_k) u_k) / (T_a |W_k|)
        v <- momentum v - dL/dW + weight_decay W;   W <- W - lr v;   n <- W / |W|

    Args:
        q_ND: Unit queries of all ranks, views and micro-batches. More rows accumulate gradients: they take N x D
            numbers and one pass over the bank, while summed gradients would take K x D numbers and a pass each.
        coef_N: w_i / Z^a_i.
        n_KD: Unit negatives, of the queries' dtype.
        w_KD: Weights, fp32 (fp64 for fp64 queries) or bf16. bf16 is rounded at random (`kernels.rounding`).
        v_KD: Velocity, with the same choice of dtypes; None for none, which counts as momentum 0.
        params: Temperature, learning rate, momentum and weight decay.
        seed: Seed of the random rounding; a number, or an int64 scalar on the queries' device.
        first: Index of the first row in the whole bank, which the random rounding depends on.
        skip: bool scalar on the queries' device. Where true, W, v and n keep their values to the bit, whatever the
            queries and coefficients are, and the statistics are zero. None takes the step.

    Raises:
        ValueError: If shapes, dtypes or memory layouts do not fit.
    """
    check_adversary(q_ND, coef_N, n_KD, w_KD, v_KD, skip)
    stored = [x_KD for x_KD in (n_KD, w_KD, v_KD) if x_KD is not None]
    before = [x_KD.clone() for x_KD in stored]
    temperature, lr, momentum, weight_decay = params
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    q_ND, old_w_KD = q_ND.to(wide), w_KD.to(wide)
    p_NK = coef_N[:, None].to(wide) * torch.exp(q_ND @ n_KD.to(wide).T / temperature)
    g_KD = p_NK.T @ q_ND
    norm_K1 = old_w_KD.norm(dim=1, keepdim=True)
    unit_KD = old_w_KD / norm_K1
    grad_KD = (g_KD - (g_KD * unit_KD).sum(1, keepdim=True) * unit_KD) / (temperature * norm_K1)
    new_v_KD = weight_decay * old_w_KD - grad_KD
    if v_KD is not None:
        new_v_KD += momentum * v_KD.to(wide)
        _write(v_KD, new_v_KD, seed, first, 16)
    _write(w_KD, old_w_KD - lr * new_v_KD, seed, first, 0)
    stored_w_KD = w_KD.to(wide)
    n_KD.copy_(stored_w_KD / stored_w_KD.norm(dim=1, keepdim=True))
    mass_K, grad_K = p_NK.sum(0), grad_KD.norm(dim=1)
    if skip is not None:
        for x_KD, old_KD in zip(stored, before, strict=True):
            x_KD.copy_(torch.where(skip, old_KD, x_KD))
        mass_K, grad_K = mass_K.masked_fill(skip, 0), grad_K.masked_fill(skip, 0)
    return AdversaryStats(mass_K=mass_K, grad_K=grad_K)


def hardest(q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, below: float | None = None) -> Hardest:
    """Find the m columns most similar to each query.

    Args:
        q_ND: Unit queries.
        c_CD: Unit columns of the same floating dtype.
        own_N: int64 index of the column to leave out for each query, -1 for none; None for none at all.
        m: Number of columns to find.
        below: Only columns less similar than this count; None for all.

    Raises:
        ValueError: If shapes, dtypes or memory layouts do not fit.
    """
    check_hardest(q_ND, c_CD, own_N, m)
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    s_NC = _without_own(q_ND.to(wide) @ c_CD.to(wide).T, own_N)
    if below is not None:
        s_NC = s_NC.masked_fill(s_NC >= below, float("-inf"))
    s_NC = torch.nn.functional.pad(s_NC, (0, max(0, m - s_NC.shape[1])), value=float("-inf"))
    sorted_NC, column_NC = s_NC.sort(dim=1, descending=True, stable=True)
    similarity_Nm, column_Nm = sorted_NC[:, :m].contiguous(), column_NC[:, :m]
    return Hardest(similarity_Nm, column_Nm.masked_fill(similarity_Nm == float("-inf"), -1))


def _without_own(s_NC: Tensor, own_N: Tensor | None) -> Tensor:
    if own_N is None:
        return s_NC
    columns_C = torch.arange(s_NC.shape[1], device=s_NC.device)
    return s_NC.masked_fill(own_N[:, None] == columns_C, float("-inf"))


def _write(out_KD: Tensor, x_KD: Tensor, seed: int | Tensor, first: int, shift: int) -> None:
    """Copy x into `out`; into a bf16 tensor with random rounding, by the random bits from bit `shift` on."""
    if out_KD.dtype == torch.bfloat16:
        bits_KD = random_bits(seed, first, len(x_KD), x_KD.shape[1], x_KD.device)
        x_KD = round_to_bf16(x_KD.float(), bits_KD >> shift)
    out_KD.copy_(x_KD)
