"""`hardest` in Triton's interpreter against the specification; run by `test_triton.py`."""

import pytest
import torch

from kernels import hardest, ops
from kernels.triton.tiles import Tiles
from tests.kernels.mining_cases import COLUMNS, QUERIES, brute_force, check, rows_with_ties, unit_rows

gpu = ops.triton_kernels()


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few large tiles, because the interpreter's time depends on the number of operations."""
    monkeypatch.setattr("kernels.triton.hardest.tiles", lambda *_: Tiles(128, 128, 8, 2))


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("queries", QUERIES)
def test_as_exact_as_plain_pytorch(queries: int, columns: int, dtype: torch.dtype) -> None:
    q_ND, c_CD, own_N = unit_rows(queries, columns, 64)
    q_ND, c_CD = q_ND.to(dtype), c_CD.to(dtype)
    for m, own, below in ((1, own_N, 0.2), (5, None, float("inf"))):
        check(gpu.hardest(q_ND, c_CD, own, m, below), q_ND, c_CD, own, m, below)


@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 3), (torch.float16, 1), (torch.bfloat16, 3)])
def test_of_equal_ones_the_lower_column(dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.triton.hardest.num_splits", lambda *_: splits)
    q_ND, c_CD, own_N = rows_with_ties(17, 255, 32)
    for m, own, below in ((3, own_N, 0.25), (16, None, float("inf"))):
        got = gpu.hardest(q_ND.to(dtype), c_CD.to(dtype), own, m, below)
        expected = brute_force(q_ND, c_CD, own, m, below)
        assert torch.equal(got.similarity_Nm.double(), expected.similarity_Nm)
        assert torch.equal(got.column_Nm, expected.column_Nm)


@pytest.mark.parametrize(("m", "splits"), [(16, 1), (16, 8), (64, 3), (128, 3)])
def test_splits(m: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of 64 columns: the last of three splits has one tile, and three of eight splits have none."""
    monkeypatch.setattr("kernels.triton.hardest.num_splits", lambda *_: splits)
    q_ND, c_CD, own_N = (x.half() if x.is_floating_point() else x for x in unit_rows(17, 257, 32))
    check(gpu.hardest(q_ND, c_CD, own_N, m, 0.3), q_ND, c_CD, own_N, m, 0.3)


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_every_dimension(dim: int) -> None:
    for dtype in (torch.float32, torch.float16):
        q_ND, c_CD, own_N = unit_rows(17, 100, dim)
        q_ND, c_CD = q_ND.to(dtype), c_CD.to(dtype)
        check(gpu.hardest(q_ND, c_CD, own_N, 3), q_ND, c_CD, own_N, 3)


@pytest.mark.parametrize("m", [1, 5, 128])
def test_fewer_columns_than_asked_for(m: int) -> None:
    q_ND, c_CD, _ = (x.float() for x in unit_rows(3, 4, 32))
    own_N = torch.zeros(3, dtype=torch.int64)
    for columns in (0, 1, 4):
        expected = brute_force(q_ND, c_CD[:columns], own_N, m)
        got = gpu.hardest(q_ND, c_CD[:columns], own_N, m)
        assert torch.equal(got.column_Nm, expected.column_Nm)
        assert torch.equal(got.similarity_Nm == float("-inf"), expected.column_Nm == -1)
    assert gpu.hardest(q_ND[:0], c_CD, None, m).column_Nm.shape == (0, m)
    assert (gpu.hardest(q_ND, c_CD, None, m, -1.5).column_Nm == -1).all()  # no column is so dissimilar


def test_zeros_of_both_signs_are_equal() -> None:
    c_CD = torch.zeros(100, 32)
    c_CD[::2] = -0.0
    assert gpu.hardest(torch.ones(2, 32), c_CD, None, 4).column_Nm.tolist() == [[0, 1, 2, 3]] * 2


def test_as_an_operator() -> None:
    q_ND, c_CD, own_N = rows_with_ties(3, 50, 32)
    got = hardest(q_ND.float(), c_CD.float(), own_N, 4, 0.5)
    assert torch.equal(got.column_Nm, brute_force(q_ND, c_CD, own_N, 4, 0.5).column_Nm)


def test_what_does_not_fit_is_refused() -> None:
    q_ND, c_CD, own_N = unit_rows(3, 4, 32)
    with pytest.raises(ValueError, match=r"hardest: got type torch.float64, the triton kernels need one of"):
        gpu.hardest(q_ND, c_CD, own_N, 1)
    with pytest.raises(ValueError, match="hardest: got m = 129, the triton kernel keeps at most 128"):
        gpu.hardest(q_ND.float(), c_CD.float(), own_N, 129)
    with pytest.raises(ValueError, match=r"hardest: got dimension 16, the triton kernels need one of"):
        gpu.hardest(q_ND[:, :16].float().contiguous(), c_CD[:, :16].float().contiguous(), own_N, 1)
