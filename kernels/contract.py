"""Result types, constants and checks of arguments that all implementations of the kernels share.

Shape suffixes: N queries, M keys, K negatives, C columns (keys or negatives), D dimensions.
"""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

# exp(88.7) overflows fp32, and exp(-87.3) is the smallest normal number.
_MAX_EXPONENT = 85.0

_UNIT_TOLERANCE = 1e-2  # on a row's norm: rounding a row to bf16 changes its norm by up to 0.004


class Score(NamedTuple):
    """Result of one pass over the similarities s_ij = q_i . c_j of N queries to C columns (M keys and K negatives).

    All fields are fp32, or the input's dtype if that is wider.

    Attributes:
        z_N: sum_j exp(s_ij / T).
        o_ND: sum_j exp(s_ij / T) c_j.
        za_N: sum_j exp(s_ij / T_a), where T_a is the adversary's temperature.
        top_N: The largest s_ij over all columns except the own key; -inf if there is none.
    """

    z_N: Tensor
    o_ND: Tensor
    za_N: Tensor
    top_N: Tensor


class AdversaryParams(NamedTuple):
    """The adversary's step: T_a, learning rate, momentum and weight decay (AdCo, eq. 7).

    The learning rate is a number, or a floating scalar on the device, which the host does not read.
    """

    temperature: float
    lr: float | Tensor
    momentum: float
    weight_decay: float


class AdversaryStats(NamedTuple):
    """Statistics of the adversary's step for each negative, fp32 (or the queries' dtype if that is wider).

    Attributes:
        mass_K: sum_i w_i p_ik, the negative's share of the batch's probability.
        grad_K: Norm of the gradient dL/dW_k.
    """

    mass_K: Tensor
    grad_K: Tensor


class Hardest(NamedTuple):
    """The m columns most similar to each query, most similar first; equal ones in the order of their indices.

    Attributes:
        similarity_Nm: fp32 (or the input's dtype if that is wider), filled up with -inf.
        column_Nm: int64 column indices, filled up with -1.
    """

    similarity_Nm: Tensor
    column_Nm: Tensor


def as_scalar(x: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a scalar on the device, fp64 or int64, without a copy from the host; a tensor as it is."""
    if isinstance(x, Tensor):
        return x
    return torch.full((), x, dtype=torch.int64 if isinstance(x, int) else torch.float64, device=device)


def check_temperature(temperature: float, columns: int) -> None:
    """Raise ValueError if a sum of `columns` terms exp(s / temperature), |s| <= 1, can overflow fp32."""
    if temperature <= 0 or 1 / temperature + math.log(max(columns, 1)) > _MAX_EXPONENT:
        least = 1 / (_MAX_EXPONENT - math.log(max(columns, 1)))
        raise ValueError(
            f"temperature {temperature:g} with {columns} negatives: sums of exp(s/temperature) overflow fp32; "
            f"need at least {least:.4f}"
        )


def check_score(q_ND: Tensor, k_MD: Tensor, own_N: Tensor | None, n_KD: Tensor) -> None:
    """Raise ValueError unless the arguments of `score` fit together."""
    _check_rows("score", {"queries": q_ND, "keys": k_MD, "negatives": n_KD})
    if len(k_MD) + len(n_KD) == 0:
        raise ValueError("score: got no keys and an empty bank, need at least one column")
    _check_own("score", q_ND, own_N)


def check_hardest(q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int) -> None:
    """Raise ValueError unless the arguments of `hardest` fit together."""
    _check_rows("hardest", {"queries": q_ND, "columns": c_CD})
    _check_own("hardest", q_ND, own_N)
    if m < 1:
        raise ValueError(f"hardest: got m = {m}, need at least 1")


def check_adversary(
    q_ND: Tensor, coef_N: Tensor, n_KD: Tensor, w_KD: Tensor, v_KD: Tensor | None, skip: Tensor | None = None
) -> None:
    """Raise ValueError unless the arguments of `adversary_step` fit together and can be updated in place."""
    name = "adversary_step"
    if skip is not None and (skip.shape != () or skip.dtype != torch.bool or skip.device != q_ND.device):
        found = f"{skip.dtype} of shape {list(skip.shape)} on {skip.device}"
        raise ValueError(f"{name}: skip is {found}, need a bool scalar on {q_ND.device}")
    _check_rows(name, {"queries": q_ND, "negatives": n_KD})
    if len(n_KD) == 0:
        raise ValueError(f"{name}: got an empty bank, need at least one negative")
    if coef_N.shape != q_ND.shape[:1]:
        raise ValueError(f"{name}: coef has shape {tuple(coef_N.shape)}, need [{len(q_ND)}]")
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    for role, x_KD in (("weights", w_KD), ("velocity", v_KD)):
        if x_KD is None:
            continue
        if x_KD.shape != n_KD.shape:
            raise ValueError(
                f"{name}: {role} have shape {list(x_KD.shape)}, need that of the negatives {list(n_KD.shape)}"
            )
        if x_KD.dtype not in (wide, torch.bfloat16):
            raise ValueError(f"{name}: {role} have type {x_KD.dtype}, need {wide} or torch.bfloat16")
        if not x_KD.is_contiguous() or x_KD.device != q_ND.device:
            raise ValueError(f"{name}: {role} are not contiguous rows on {q_ND.device}, and are updated in place")


def _check_rows(name: str, tensors: dict[str, Tensor]) -> None:
    """Check that all are contiguous rows of one dimension, dtype and device; in debug mode also of unit length."""
    first_role, first = next(iter(tensors.items()))
    for role, x in tensors.items():
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"{name}: {role} are {x.dtype} of shape {list(x.shape)}, need floating rows [., D]")
        if not x.is_contiguous():
            raise ValueError(f"{name}: {role} have strides {x.stride()}, need contiguous rows")
        for attribute, value, needed in (
            ("dimension", x.shape[1], first.shape[1]),
            ("type", x.dtype, first.dtype),
            ("device", x.device, first.device),
        ):
            if value != needed:
                raise ValueError(f"{name}: {role} have {attribute} {value}, need that of the {first_role}, {needed}")
        if os.environ.get("TRAINER_DEBUG") and len(x):
            norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
            worst = (norms - 1).abs().nan_to_num(torch.inf).argmax()
            if not abs(float(norms[worst]) - 1) <= _UNIT_TOLERANCE:
                raise ValueError(f"{name}: row {worst} of the {role} has norm {norms[worst]:g}, need unit rows")


def _check_own(name: str, q_ND: Tensor, own_N: Tensor | None) -> None:
    if own_N is None:
        return
    if own_N.shape != q_ND.shape[:1] or own_N.dtype != torch.int64 or not own_N.is_contiguous():
        raise ValueError(
            f"{name}: own is {own_N.dtype} of shape {list(own_N.shape)}, need contiguous int64 [{len(q_ND)}]"
        )
