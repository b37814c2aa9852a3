"""The hot arithmetic of the game between encoder and negatives (AdCo, arXiv 2011.08435).

Two functions, each with one implementation per module of this folder, all with the same results:

- `score`: one pass over the similarities of queries to keys and negatives. It gives the partition
  sums at the encoder's and at the adversary's temperature and the weighted sum of columns that
  the encoder's gradient needs.
- `adversary_step`: one pass over the negatives. Gradient ascent with momentum on the contrastive
  loss, in place.

`reference` materialises everything and is the specification; `chunked` tiles over the negatives,
stores nothing of size N x K and is the fast path on a CPU; `gpu` does the same in Triton, with one kernel
for each function (`score`, `adversary`; their tile sizes are in `tiles`).

Shapes: N queries, M keys, K negatives, D dimensions. Queries, keys and unit negatives have unit
length, so every similarity s lies in [-1, 1] and exp(s/T) fits fp32 without a running maximum:
partial sums over tiles, shards and ranks merge by plain addition.
"""

import math
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# exp(88.7) overflows fp32 and exp(-87.3) is the smallest normal number.
_MAX_EXPONENT = 85.0


class Score(NamedTuple):
    """What one pass over the similarities s_ij = q_i . c_j of N queries to C columns gives.

    z_N: sum_j exp(s_ij / T), fp32 (or the input's type if wider), as all fields.
    o_ND: sum_j exp(s_ij / T) c_j.
    za_N: sum_j exp(s_ij / T_a), T_a the adversary's temperature.
    top_N: the largest s_ij over all columns but the own key; -inf where there is none.
    """

    z_N: Tensor
    o_ND: Tensor
    za_N: Tensor
    top_N: Tensor


class AdversaryStats(NamedTuple):
    """Per negative, fp32 [K]: what the adversary's step saw.

    mass_K: sum_i w_i p_ik, the share of the batch's probability that this negative carries.
    grad_K: length of the gradient dL/dW_k.
    """

    mass_K: Tensor
    grad_K: Tensor


def implementation(name: str) -> ModuleType:
    """The module that holds `score` and `adversary_step` under this name.

    Raises ValueError for a name that is not one of `reference`, `chunked` and `triton`, and for `triton` where
    there is nothing to run it.
    """
    from kernels import chunked, reference

    if name == "triton":
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("kernels: triton needs a CUDA device, or TRITON_INTERPRET=1 to run slowly on the CPU")
        from kernels import gpu

        return gpu
    modules = {"reference": reference, "chunked": chunked}
    if name not in modules:
        raise ValueError(f"kernels: got {name!r}, need one of {', '.join(modules)}, triton")
    return modules[name]


def check_temperature(temperature: float, columns: int) -> None:
    """Raise ValueError where the unshifted sum of `columns` terms exp(s/T), |s| <= 1, leaves fp32's range."""
    if temperature <= 0 or 1 / temperature + math.log(max(columns, 1)) > _MAX_EXPONENT:
        least = 1 / (_MAX_EXPONENT - math.log(max(columns, 1)))
        raise ValueError(
            f"temperature {temperature:g} with {columns} negatives: sums of exp(s/temperature) overflow fp32; "
            f"need at least {least:.4f}"
        )


def check_inputs(q_ND: Tensor, k_MD: Tensor, own_N: Tensor | None, n_KD: Tensor) -> None:
    """Raise ValueError unless the shapes and types of `score`'s arguments fit together."""
    if q_ND.ndim != 2 or k_MD.ndim != 2 or n_KD.ndim != 2:
        shapes = [tuple(t.shape) for t in (q_ND, k_MD, n_KD)]
        raise ValueError(f"score: got queries, keys, negatives of shape {shapes}, need [N, D], [M, D], [K, D]")
    if not q_ND.shape[1] == k_MD.shape[1] == n_KD.shape[1]:
        dims = (q_ND.shape[1], k_MD.shape[1], n_KD.shape[1])
        raise ValueError(f"score: queries, keys and negatives have dimensions {dims}, need the same")
    if not q_ND.dtype == k_MD.dtype == n_KD.dtype:
        types = (q_ND.dtype, k_MD.dtype, n_KD.dtype)
        raise ValueError(f"score: queries, keys and negatives have types {types}, need the same")
    if own_N is not None and own_N.shape != q_ND.shape[:1]:
        raise ValueError(f"score: own has shape {tuple(own_N.shape)}, need [{q_ND.shape[0]}]")
