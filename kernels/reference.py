"""The specification of the kernels: plain PyTorch, any floating type, everything materialised.

Half types are widened to fp32 first, in which exp(1/T_a) fits. N queries, M keys, K negatives,
D dimensions. See `kernels/__init__.py` for what the results mean.
"""

import torch
from torch import Tensor

from kernels import AdversaryStats, Score, check_inputs


def score(
    q_ND: Tensor,
    k_MD: Tensor,
    own_N: Tensor | None,
    n_KD: Tensor,
    temperature: float,
    adversary_temperature: float,
) -> Score:
    """Partition sums of every query over all keys and negatives (AdCo, eq. 2 and 6).

    q_ND, k_MD, n_KD: unit rows of one floating type; M may be 0.
    own_N: int64, the column of k_MD that is the query's own key, -1 if it is not among them;
        None if no query has its key here. The own key is a term of the sums, but not of `top`.
    Raises ValueError where shapes or types do not fit.
    """
    check_inputs(q_ND, k_MD, own_N, n_KD)
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    c_CD = torch.cat([k_MD, n_KD]).to(wide)
    s_NC = q_ND.to(wide) @ c_CD.T
    e_NC = torch.exp(s_NC / temperature)
    rival_NC = s_NC
    if own_N is not None:
        columns_C = torch.arange(len(c_CD), device=s_NC.device)
        rival_NC = s_NC.masked_fill(own_N[:, None] == columns_C, float("-inf"))
    return Score(
        z_N=e_NC.sum(1),
        o_ND=e_NC @ c_CD,
        za_N=torch.exp(s_NC / adversary_temperature).sum(1),
        top_N=rival_NC.amax(1),
    )


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
    """One step of gradient ascent on the contrastive loss, in place in W, v and n (AdCo, eq. 7).

    With p_ik = w_i exp(q_i . n_k / T_a) / Z^a_i and G_k = sum_i p_ik q_i,
        dL/dW_k = (G_k - (G_k . n_k) n_k) / (T_a |W_k|)
        v <- m v - dL/dW + lambda W;   W <- W - lr v;   n <- W / |W|.

    q_ND: unit queries of all ranks, views and micro-batches. coef_N: w_i / Z^a_i.
    n_KD, w_KD, v_KD: unit negatives, master weights, velocity. temperature: T_a.
    q and n may be of a narrower type than W and v, in whose type all is computed.
    """
    q_ND, n_wide_KD = q_ND.to(w_KD.dtype), n_KD.to(w_KD.dtype)
    p_NK = coef_N[:, None] * torch.exp(q_ND @ n_wide_KD.T / temperature)
    g_KD = p_NK.T @ q_ND
    length_K1 = w_KD.norm(dim=1, keepdim=True)
    grad_KD = (g_KD - (g_KD * n_wide_KD).sum(1, keepdim=True) * n_wide_KD) / (temperature * length_K1)
    v_KD.mul_(momentum).sub_(grad_KD).add_(w_KD, alpha=weight_decay)
    w_KD.sub_(v_KD, alpha=lr)
    n_KD.copy_(w_KD / w_KD.norm(dim=1, keepdim=True))
    return AdversaryStats(mass_K=p_NK.sum(0), grad_K=grad_KD.norm(dim=1))
