"""Inputs for the tests of `hardest`, and checks of its results.

N queries, C columns, D dimensions, m best.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Hardest, reference

QUERIES = (1, 17, 255)
COLUMNS = (1, 17, 255, 1000)

# Similarities of unit vectors in fp32 that differ by less may be in either order.
ROUNDING = 1e-6


def unit_rows(queries: int, columns: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_ND and c_CD in fp64, and own_N: a random column each, every third -1. Equal for equal arguments."""
    generator = torch.Generator().manual_seed(queries + 31 * columns + 101 * dim)
    q_ND = F.normalize(torch.randn(queries, dim, generator=generator, dtype=torch.float64), dim=1)
    c_CD = F.normalize(torch.randn(columns, dim, generator=generator, dtype=torch.float64), dim=1)
    return q_ND, c_CD, _own(queries, columns, generator)


def rows_with_ties(queries: int, columns: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like `unit_rows`, with elements -1/4, 0 and 1/4: similarities are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(queries + 31 * columns + 101 * dim)
    q_ND = torch.randint(-1, 2, (queries, dim), generator=generator).double() / 4
    c_CD = torch.randint(-1, 2, (columns, dim), generator=generator).double() / 4
    return q_ND, c_CD, _own(queries, columns, generator)


def _own(queries: int, columns: int, generator: torch.Generator) -> Tensor:
    own_N = torch.randint(columns, (queries,), generator=generator)
    own_N[2::3] = -1
    return own_N


def brute_force(q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, below: float = float("inf")) -> Hardest:
    """Compute `hardest` by sorting a list of Python numbers for each query, in fp64."""
    similarity, column = [], []
    for i, s_C in enumerate((q_ND.double() @ c_CD.double().T).tolist()):
        ranked = sorted((-s, j) for j, s in enumerate(s_C) if s < below and (own_N is None or j != own_N[i]))[:m]
        ranked += [(float("inf"), -1)] * (m - len(ranked))
        similarity.append([-s for s, _ in ranked])
        column.append([j for _, j in ranked])
    shape = (len(q_ND), m)
    return Hardest(torch.tensor(similarity).double().view(shape), torch.tensor(column, dtype=torch.int64).view(shape))


def check(got: Hardest, q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, below: float = float("inf")) -> None:
    """Check that errors are at most plain PyTorch's of the same dtype, and columns right up to nearly equal ones."""
    wide = torch.promote_types(q_ND.dtype, torch.float32)
    assert got.similarity_Nm.dtype == wide
    assert got.column_Nm.dtype == torch.int64
    assert got.similarity_Nm.shape == got.column_Nm.shape == (len(q_ND), m)
    truth = reference.hardest(q_ND.double(), c_CD.double(), own_N, m + 1, below)
    plain = reference.hardest(q_ND, c_CD, own_N, m, below)
    exact_Nm = truth.similarity_Nm[:, :m]
    there_Nm = exact_Nm > float("-inf")
    assert torch.equal(got.similarity_Nm > float("-inf"), there_Nm)
    assert torch.equal(got.column_Nm >= 0, there_Nm)
    if there_Nm.any():
        allowed = (plain.similarity_Nm.double() - exact_Nm)[there_Nm].abs().max() + ROUNDING
        error = (got.similarity_Nm.double() - exact_Nm)[there_Nm].abs().max()
        assert error <= allowed, f"similarity: error {error:.2e}, allowed {allowed:.2e}"
    # The gap to the next column: a column whose gaps on both sides exceed rounding must be in its place.
    gap_Nm = truth.similarity_Nm[:, :m] - truth.similarity_Nm[:, 1:].nan_to_num(neginf=-2)
    apart_Nm = gap_Nm > ROUNDING
    apart_Nm[:, 1:] &= gap_Nm[:, :-1] > ROUNDING
    apart_Nm &= there_Nm
    assert apart_Nm.sum() >= 0.9 * there_Nm.sum()  # otherwise the next line would compare nothing
    assert torch.equal(got.column_Nm[apart_Nm], truth.column_Nm[:, :m][apart_Nm])
    # The other columns have their similarities, none is the own column, and none occurs twice.
    s_NC = F.pad(q_ND.double() @ c_CD.double().T, (0, 1), value=float("-inf"))  # column -1 is the padding
    torch.testing.assert_close(
        s_NC.gather(1, got.column_Nm % s_NC.shape[1]), got.similarity_Nm.double(), rtol=0, atol=2 * ROUNDING
    )
    if own_N is not None:
        assert not ((got.column_Nm == own_N[:, None]) & there_Nm).any()
    for row in got.column_Nm.tolist():
        columns = [j for j in row if j >= 0]
        assert len(set(columns)) == len(columns)
