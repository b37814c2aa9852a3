"""Random inputs for the tests of the kernels, calls of the kernels, and bounds on their errors."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import AdversaryParams, AdversaryStats, Score, ops, reference
from kernels.triton import tiles

TEMPERATURE = 0.12
ADVERSARY_TEMPERATURE = 0.02


class Case(NamedTuple):
    """N unit queries, M unit keys, K unit negatives with weights and velocity, and the own keys of `score`."""

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
    """Make a case in fp64, the same for the same arguments.

    Args:
        queries: N.
        keys: M.
        negatives: K.
        dim: D.
        own: `none`, `absent` (own_N is -1 everywhere) or `own` (a random key for each query; every third is absent).
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


def use_kernels(name: str) -> None:
    """Let the operators of this process run `reference`, `chunked`, or `triton` with wide tiles on a CPU."""
    if name == "reference":
        ops.chunked = reference
    if name == "triton":
        use_wide_tiles(tiles.TABLE)


def use_wide_tiles(table: dict[tiles.Key, tiles.Tiles]) -> None:
    """Replace all tiles by large ones, because the interpreter's time depends on the number of operations."""
    table.update(dict.fromkeys(table, tiles.Tiles(128, 128, 8, 2)))


def score(kernels: Any, case: Case, adversary_temperature: float = ADVERSARY_TEMPERATURE) -> Score:
    got: Score = kernels.score(case.q_ND, case.k_MD, case.own_N, case.n_KD, TEMPERATURE, adversary_temperature)
    return got


def step(kernels: Any, case: Case, coef_N: Tensor) -> tuple[Case, AdversaryStats]:
    """Return a copy of the case after one step of the adversary, and the step's statistics."""
    after = case._replace(n_KD=case.n_KD.clone(), w_KD=case.w_KD.clone(), v_KD=case.v_KD.clone())
    stats = kernels.adversary_step(
        after.q_ND,
        coef_N,
        after.n_KD,
        after.w_KD,
        after.v_KD,
        AdversaryParams(ADVERSARY_TEMPERATURE, 3.0, 0.9, 1e-4),
    )
    return after, stats


def check_skip(kernels: Any, case: Case, v_KD: Tensor | None) -> None:
    """Check that `skip` keeps every bit of the bank although the inputs are not finite, and false does nothing."""
    coef_N = torch.full((len(case.q_ND),), 1e-20, dtype=torch.promote_types(case.q_ND.dtype, torch.float32))
    params = AdversaryParams(ADVERSARY_TEMPERATURE, 3.0, 0.9, 1e-4)

    def run(coef_N: Tensor, *skip: Tensor) -> tuple[list[Tensor], AdversaryStats]:
        stored = [x if x is None else x.clone() for x in (case.n_KD, case.w_KD, v_KD)]
        stats = kernels.adversary_step(case.q_ND, coef_N, *stored, params, 5, 2, *skip)
        return [x for x in stored if x is not None], stats

    kept, stats = run(coef_N * torch.nan, torch.tensor(True))
    before = [x for x in (case.n_KD, case.w_KD, v_KD) if x is not None]
    assert all(torch.equal(x, old) for x, old in zip(kept, before, strict=True))
    assert not any(x.any() for x in stats)
    (moved, stats), (expected, plain) = run(coef_N, torch.tensor(False)), run(coef_N)
    assert all(torch.equal(x, y) for x, y in zip([*moved, *stats], [*expected, *plain], strict=True))
    assert not any(torch.equal(x, old) for x, old in zip(moved, before, strict=True))


def changed(after: Case, stats: AdversaryStats) -> dict[str, Tensor]:
    return {"w": after.w_KD, "v": after.v_KD, "n": after.n_KD, **stats._asdict()}


def check_as_exact_as_plain(name: str, got: Tensor, plain: Tensor, truth: Tensor, slack: float) -> None:
    """Check that the error is at most that of plain fp32 PyTorch plus a share `slack` of the largest value."""
    allowed = (plain.double() - truth).abs().max() + slack * truth.abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_score(got: Score, plain: Score, truth: Score) -> None:
    for name in Score._fields:
        assert getattr(got, name).dtype == torch.float32
        # The sixth power of e^(s/T) has six times the rounding error.
        slack = 1e-5 if name == "za_N" else 3e-6
        check_as_exact_as_plain(name, getattr(got, name), getattr(plain, name), getattr(truth, name), slack)


def check_step(got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Check the results of `changed`."""
    for name in got:
        # The statistics are sums of e^(s/T) at the adversary's temperature, as za_N is.
        slack = 1e-5 if name in AdversaryStats._fields else 3e-6
        check_as_exact_as_plain(name, got[name], plain[name], truth[name], slack)
