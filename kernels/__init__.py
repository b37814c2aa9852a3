"""The hot arithmetic of the game between encoder and negatives (AdCo, arXiv 2011.08435).

Three functions, torch custom operators (so torch.compile does not break at them and fake tensors pass), each with
one implementation per module of this folder, all with the same results:

- `score`: one pass over the similarities of queries to keys and negatives. It gives the partition sums at the
  encoder's and at the adversary's temperature and the weighted sum of columns that the encoder's gradient needs.
- `adversary_step`: one pass over the negatives. Gradient ascent with momentum on the contrastive loss, in place.
- `hardest`: the m columns most similar to each query, in one pass.

`reference` materialises everything and is the specification: its docstrings say what arguments mean. `chunked` tiles
over the columns, stores nothing of size N x K and is the fast path on a CPU; `triton` does the same on NVIDIA GPUs
from sm_80 on (`gpu`, with a module `triton_…` for each function). The choice is the caller's.

Shapes: N queries, M keys, K negatives, C columns, D dimensions. Queries, keys and unit negatives have unit length,
so every similarity s lies in [-1, 1] and exp(s/T) fits fp32 without a running maximum: partial sums over tiles,
shards and ranks merge by plain addition.
"""

import os
from types import ModuleType

import torch
from torch import Tensor

from kernels.contract import AdversaryStats, Hardest, Score, check_temperature

__all__ = [
    "IMPLEMENTATIONS",
    "AdversaryStats",
    "Hardest",
    "Score",
    "adversary_step",
    "check_temperature",
    "hardest",
    "implementation",
    "score",
]

IMPLEMENTATIONS = ("reference", "chunked", "triton")


def implementation(name: str) -> ModuleType:
    """The module that holds `score`, `adversary_step` and `hardest` under a name of IMPLEMENTATIONS.

    Raises ValueError for another name, and for `triton` where there is nothing to run it.
    """
    if name == "reference":
        from kernels import reference

        return reference
    if name == "chunked":
        from kernels import chunked

        return chunked
    if name == "triton":
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("kernels: triton needs a CUDA device, or TRITON_INTERPRET=1 to run slowly on the CPU")
        from kernels.triton import functions as gpu

        return gpu
    raise ValueError(f"kernels: got {name!r}, need one of {', '.join(IMPLEMENTATIONS)}")


def score(
    q_ND: Tensor,
    k_MD: Tensor,
    own_N: Tensor | None,
    n_KD: Tensor,
    temperature: float,
    adversary_temperature: float,
    *,
    kernels: str,
) -> Score:
    """`reference.score` by the implementation `kernels`."""
    return Score(*_score(kernels, q_ND, k_MD, own_N, n_KD, temperature, adversary_temperature))


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
    kernels: str,
) -> AdversaryStats:
    """`reference.adversary_step` by the implementation `kernels`."""
    return AdversaryStats(
        *_adversary_step(kernels, q_ND, coef_N, n_KD, w_KD, v_KD, temperature, lr, momentum, weight_decay, seed, first)
    )


def hardest(
    q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, below: float = float("inf"), *, kernels: str
) -> Hardest:
    """`reference.hardest` by the implementation `kernels`."""
    return Hardest(*_hardest(kernels, q_ND, c_CD, own_N, m, below))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("adco::score", mutates_args=())
def _score(
    kernels: str,
    q: Tensor,
    k: Tensor,
    own: Tensor | None,
    n: Tensor,
    temperature: float,
    adversary_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_N, o_ND, za_N, top_N = implementation(kernels).score(q, k, own, n, temperature, adversary_temperature)
    return z_N, o_ND, za_N, top_N


@_score.register_fake
def _(
    kernels: str,
    q: Tensor,
    k: Tensor,
    own: Tensor | None,
    n: Tensor,
    temperature: float,
    adversary_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_N, za_N, top_N = (q.new_empty(q.shape[0], dtype=_wide(q)) for _ in range(3))
    return z_N, q.new_empty(q.shape, dtype=_wide(q)), za_N, top_N


@torch.library.custom_op("adco::adversary_step", mutates_args=("n", "w", "v"))
def _adversary_step(
    kernels: str,
    q: Tensor,
    coef: Tensor,
    n: Tensor,
    w: Tensor,
    v: Tensor | None,
    temperature: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    mass_K, grad_K = implementation(kernels).adversary_step(
        q,
        coef,
        n,
        w,
        v,
        temperature=temperature,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
        first=first,
    )
    return mass_K, grad_K


@_adversary_step.register_fake
def _(
    kernels: str,
    q: Tensor,
    coef: Tensor,
    n: Tensor,
    w: Tensor,
    v: Tensor | None,
    temperature: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    mass_K, grad_K = (w.new_empty(w.shape[0], dtype=_wide(q)) for _ in range(2))
    return mass_K, grad_K


@torch.library.custom_op("adco::hardest", mutates_args=())
def _hardest(kernels: str, q: Tensor, c: Tensor, own: Tensor | None, m: int, below: float) -> tuple[Tensor, Tensor]:
    similarity_Nm, column_Nm = implementation(kernels).hardest(q, c, own, m, below)
    return similarity_Nm, column_Nm


@_hardest.register_fake
def _(kernels: str, q: Tensor, c: Tensor, own: Tensor | None, m: int, below: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], m, dtype=_wide(q)), q.new_empty(q.shape[0], m, dtype=torch.int64)
