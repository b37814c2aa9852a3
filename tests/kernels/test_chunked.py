"""The tiled kernels against the specification: exact in fp64, and in fp32 with the errors of plain PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import AdversaryParams, chunked, reference
from tests.kernels.cases import (
    ADVERSARY_TEMPERATURE,
    Case,
    changed,
    check_score,
    check_skip,
    check_step,
    make_case,
    score,
    step,
)

SIZES = [1, 17, 255, 513, 1000]
TILE = 256  # smaller than the default, so that the sizes above have several tiles and a ragged one


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_TILE", TILE)


@pytest.mark.parametrize("negatives", SIZES)
@pytest.mark.parametrize("queries", SIZES)
def test_equals_the_reference(queries: int, negatives: int) -> None:
    for keys in (0, queries, 3 * queries):
        case = make_case(queries, keys, negatives, dim=128 if queries == negatives else 32)
        expected = score(reference, case)
        torch.testing.assert_close(score(chunked, case)._asdict(), expected._asdict())
    coef_N = 1 / (expected.za_N * queries)
    torch.testing.assert_close(changed(*step(chunked, case, coef_N)), changed(*step(reference, case, coef_N)))


@pytest.mark.parametrize("own", ["none", "absent", "own"])
@pytest.mark.parametrize("keys", [0, 17, 51, 600])
def test_own_keys(keys: int, own: str) -> None:
    case = make_case(17, keys, 40, 32, own)
    torch.testing.assert_close(score(chunked, case)._asdict(), score(reference, case)._asdict())


@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize(("queries", "negatives"), [(1, 1), (17, 1000), (255, 513), (513, 255), (1000, 1000)])
def test_fp32_is_as_exact_as_plain_pytorch(queries: int, negatives: int, dim: int) -> None:
    narrow = make_case(queries, queries, negatives, dim).to(torch.float32)
    wide = narrow.to(torch.float64)
    truth = score(reference, wide)
    check_score(score(chunked, narrow), score(reference, narrow), truth)
    coef_N = 1 / (truth.za_N * queries)
    plain_step = changed(*step(reference, narrow, coef_N.float()))
    exact_step = changed(*step(reference, wide, coef_N))
    check_step(changed(*step(chunked, narrow, coef_N.float())), plain_step, exact_step)


@pytest.mark.parametrize("adversary_temperature", [0.02, 0.03, 0.05, 0.12, 0.2])
def test_any_ratio_of_temperatures(adversary_temperature: float) -> None:
    case = make_case(17, 34, 513, 32)
    expected = score(reference, case, adversary_temperature)
    torch.testing.assert_close(score(chunked, case, adversary_temperature)._asdict(), expected._asdict())
    narrow = case.to(torch.float32)
    truth = score(reference, narrow.to(torch.float64), adversary_temperature)
    got, plain = (score(kernels, narrow, adversary_temperature) for kernels in (chunked, reference))
    check_score(got, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype: torch.dtype) -> None:
    case = make_case(17, 17, 513, 32)
    half = case.to(dtype)._replace(w_KD=case.w_KD.float(), v_KD=case.v_KD.float())  # the weights stay fp32
    expected = score(reference, half.to(torch.float64))
    check_score(score(chunked, half), score(reference, half), expected)
    coef_N = (1 / (expected.za_N * 17)).float()
    truth = changed(*step(reference, half, coef_N))
    for name, value in changed(*step(chunked, half, coef_N)).items():
        assert value.dtype == (dtype if name == "n" else torch.float32)
        torch.testing.assert_close(value, truth[name], rtol=1e-2 if name == "n" else 1e-5, atol=1e-5)


def test_default_tile_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = make_case(5, 1500, 2500, 32)
    assert chunked._TILE < 1500
    torch.testing.assert_close(score(chunked, case)._asdict(), score(reference, case)._asdict())


@pytest.mark.parametrize("kernels", [reference, chunked])
def test_the_step_changes_the_bank_in_place_and_nothing_else(kernels: Any) -> None:
    case = make_case(17, 17, 300, 32)
    before = [t.clone() for t in case if t is not None]
    coef_N = torch.full((17,), 1e-20, dtype=torch.float64)
    addresses = [t.data_ptr() for t in (case.w_KD, case.v_KD, case.n_KD)]
    kernels.adversary_step(
        case.q_ND,
        coef_N,
        case.n_KD,
        case.w_KD,
        case.v_KD,
        AdversaryParams(ADVERSARY_TEMPERATURE, 1.0, 0.9, 0.0),
    )
    assert [t.data_ptr() for t in (case.w_KD, case.v_KD, case.n_KD)] == addresses
    same = [torch.equal(t, old) for t, old in zip((t for t in case if t is not None), before, strict=True)]
    assert same == [True, True, True, False, False, False]  # q, k, own; n, W, v
    assert torch.equal(coef_N, torch.full((17,), 1e-20, dtype=torch.float64))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [reference, chunked])
def test_a_skipped_step_changes_no_bit(kernels: Any, weights: torch.dtype) -> None:
    case = make_case(17, 17, 300, 32).to(torch.float32)
    case = case._replace(w_KD=case.w_KD.to(weights))
    for v_KD in (case.v_KD, case.v_KD.bfloat16(), None):
        check_skip(kernels, case, v_KD)


def test_a_row_of_no_weight_counts_for_nothing() -> None:
    case = make_case(17, 17, 300, 32)
    coef_N = torch.full((17,), 1e-20, dtype=torch.float64)
    coef_N[5:] = 0
    without = changed(*step(chunked, case._replace(q_ND=case.q_ND[:5]), coef_N[:5]))
    torch.testing.assert_close(changed(*step(chunked, case, coef_N)), without)


class LargestOutput(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in outputs)])
        return result


def largest_output(kernels: Any, case: Case) -> int:
    with LargestOutput() as largest:
        got = score(kernels, case)
        step(kernels, case, 1 / (got.za_N * len(case.q_ND)))
    return largest.numel


def test_nothing_of_size_queries_times_negatives() -> None:
    case = make_case(256, 256, 8192, 16)
    assert largest_output(reference, case) >= 256 * 8192  # the probe sees such a tensor
    assert largest_output(chunked, case) <= max(256 * TILE, 8192 * 16)  # a tile, the bank
