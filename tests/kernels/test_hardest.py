"""`hardest`: the specification against brute force, and the chunked kernel against the specification."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Hardest, chunked, hardest, reference
from tests.kernels.mining_cases import COLUMNS, QUERIES, brute_force, check, rows_with_ties, unit_rows
from tests.kernels.test_chunked import LargestOutput

BOTH = pytest.mark.parametrize("kernels", [reference, chunked])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles that are no multiple of a block, so that 255 and 1000 columns have several tiles and a ragged one."""
    monkeypatch.setattr(chunked, "_TILE", 200)
    monkeypatch.setattr(chunked, "_BLOCK", 16)


def equal(got: Hardest, expected: Hardest) -> bool:
    return torch.equal(got.similarity_Nm.double(), expected.similarity_Nm) and torch.equal(
        got.column_Nm, expected.column_Nm
    )


@BOTH
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("queries", [1, 17])
def test_the_best_of_each_row(kernels: Any, queries: int, columns: int) -> None:
    q_ND, c_CD, own_N = unit_rows(queries, columns, 32)
    for m, own, below in ((1, None, float("inf")), (16, None, 0.3), (16, own_N, float("inf")), (5, own_N, 0.3)):
        got = kernels.hardest(q_ND, c_CD, own, m, below)
        expected = brute_force(q_ND, c_CD, own, m, below)
        assert torch.equal(got.column_Nm, expected.column_Nm)
        torch.testing.assert_close(got.similarity_Nm, expected.similarity_Nm)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "columns", "m"), [(1, 1, 1), (17, 255, 1), (17, 1000, 16), (60, 255, 40)])
def test_of_equal_ones_the_lower_column(kernels: Any, queries: int, columns: int, m: int, dtype: torch.dtype) -> None:
    q_ND, c_CD, own_N = rows_with_ties(queries, columns, 32)
    given = q_ND.to(dtype), c_CD.to(dtype)
    for own in (None, own_N):
        assert equal(kernels.hardest(*given, own, m), brute_force(q_ND, c_CD, own, m))
        # A guard equal to a similarity that occurs leaves out columns of this similarity.
        assert equal(kernels.hardest(*given, own, m, 0.25), brute_force(q_ND, c_CD, own, m, 0.25))


@BOTH
def test_one_column_many_times(kernels: Any) -> None:
    q_ND, c_CD, _ = rows_with_ties(5, 1, 32)  # products of other rows may round differently in other columns
    got = kernels.hardest(q_ND, c_CD.repeat(500, 1), torch.tensor([0, 1, -1, 499, 2]), 3)
    assert got.column_Nm.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 2], [0, 1, 2], [0, 1, 3]]


@BOTH
def test_zeros_of_both_signs_are_equal(kernels: Any) -> None:
    c_CD = torch.zeros(300, 32)
    c_CD[::2] = -0.0
    assert kernels.hardest(torch.ones(2, 32), c_CD, None, 4).column_Nm.tolist() == [[0, 1, 2, 3]] * 2


@BOTH
def test_every_column_better_than_those_before(kernels: Any) -> None:
    angle_C = torch.linspace(3, 0.1, 700, dtype=torch.float64)
    c_CD = torch.stack([angle_C.cos(), angle_C.sin()], 1)
    q_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    got = kernels.hardest(q_ND, c_CD, None, 20)
    assert got.column_Nm.tolist() == [list(range(699, 679, -1)), list(range(20))]


@BOTH
@pytest.mark.parametrize("m", [1, 5, 300])
def test_fewer_columns_than_asked_for(kernels: Any, m: int) -> None:
    q_ND, c_CD, _ = unit_rows(3, 4, 32)
    for columns in (0, 1, 4):
        own_N = torch.zeros(3, dtype=torch.int64)
        expected = brute_force(q_ND, c_CD[:columns], own_N, m)
        got = kernels.hardest(q_ND, c_CD[:columns], own_N, m)
        assert torch.equal(got.column_Nm, expected.column_Nm)
        assert torch.equal(got.similarity_Nm == float("-inf"), expected.column_Nm == -1)
    assert kernels.hardest(q_ND[:0], c_CD, None, m).column_Nm.shape == (0, m)
    assert (kernels.hardest(q_ND, c_CD, None, m, -1.5).column_Nm == -1).all()  # no column is so dissimilar


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("queries", QUERIES)
def test_as_exact_as_plain_pytorch(queries: int, columns: int, dtype: torch.dtype) -> None:
    q_ND, c_CD, own_N = unit_rows(queries, columns, 128)
    q_ND, c_CD = q_ND.to(dtype), c_CD.to(dtype)
    for m, own, below in ((1, own_N, 0.15), (16, None, 0.15), (64, own_N, float("inf"))):
        check(chunked.hardest(q_ND, c_CD, own, m, below), q_ND, c_CD, own, m, below)


def test_default_tile_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    q_ND, c_CD, own_N = unit_rows(40, 3000, 32)
    assert chunked._TILE < 1500
    check(chunked.hardest(q_ND.float(), c_CD.float(), own_N, 16), q_ND.float(), c_CD.float(), own_N, 16)


def largest_output(kernels: Any, q_ND: Tensor, c_CD: Tensor) -> int:
    with LargestOutput() as largest:
        kernels.hardest(q_ND, c_CD, None, 8, 0.9)
    return largest.numel


def test_nothing_of_size_queries_times_columns() -> None:
    q_ND, c_CD, _ = unit_rows(256, 8192, 16)
    assert largest_output(reference, q_ND, c_CD) >= 256 * 8192  # the probe sees such a tensor
    assert largest_output(chunked, q_ND, c_CD) <= 256 * 208  # a tile, rounded up to blocks


def test_as_an_operator() -> None:
    q_ND, c_CD, own_N = rows_with_ties(3, 50, 32)
    assert equal(hardest(q_ND, c_CD, own_N, 4, 0.5), brute_force(q_ND, c_CD, own_N, 4, 0.5))


@BOTH
def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    q_ND, c_CD, own_N = unit_rows(3, 4, 32)
    with pytest.raises(ValueError, match="hardest: got m = 0, need at least 1"):
        kernels.hardest(q_ND, c_CD, own_N, 0)
    with pytest.raises(ValueError, match=r"hardest: columns have type torch.float32, need that of the queries"):
        kernels.hardest(q_ND, c_CD.float(), own_N, 1)
    with pytest.raises(ValueError, match=r"hardest: own is torch.int64 of shape \[2\], need contiguous int64 \[3\]"):
        kernels.hardest(q_ND, c_CD, own_N[:2], 1)
