"""Random inputs for the kernels' tests."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.12
ADVERSARY_TEMPERATURE = 0.02


class Case(NamedTuple):
    """N unit queries, M unit keys, K unit negatives with weights and velocity; own_N as `score` takes it."""

    q_ND: Tensor
    k_MD: Tensor
    own_N: Tensor | None
    n_KD: Tensor
    w_KD: Tensor
    v_KD: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        tensors = {name: t.to(dtype) for name, t in self._asdict().items() if name != "own_N"}
        return self._replace(**tensors)


def make_case(queries: int, keys: int, negatives: int, dim: int, own: str = "own") -> Case:
    """A case in fp64, the same for the same arguments.

    own: `none`, `absent` (no query has its key here) or `own` (a random key each; every third is absent).
    """
    generator = torch.Generator().manual_seed(queries + 7 * keys + 31 * negatives + 101 * dim)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    own_N = None
    if own == "absent" or (own == "own" and keys == 0):
        own_N = torch.full((queries,), -1)
    elif own == "own":
        own_N = torch.randint(keys, (queries,), generator=generator)
        own_N[2::3] = -1
    w_KD = random(negatives)
    return Case(
        q_ND=F.normalize(random(queries), dim=1),
        k_MD=F.normalize(random(keys), dim=1),
        own_N=own_N,
        n_KD=F.normalize(w_KD, dim=1),
        w_KD=w_KD,
        v_KD=0.1 * random(negatives),
    )
