"""The Triton kernels in Triton's interpreter against the specification; run by `test_triton.py`.

The interpreter knows nothing of tf32 and of bf16 products: it multiplies in fp32 where a GPU would round the factors.
"""

from typing import Any

import pytest
import torch

from kernels import gpu, implementation, reference
from kernels.tiles import num_splits
from tests.kernels.cases import (
    ADVERSARY_TEMPERATURE,
    TEMPERATURE,
    Case,
    changed,
    check_as_exact_as_plain,
    check_score,
    make_case,
    score,
    step,
)
from tests.kernels.test_golden import GAMES, check_first_step

SIZES = [(1, 1), (1, 1000), (17, 255), (255, 17), (64, 256), (300, 1000)]  # queries, negatives


def narrow_case(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Case:
    """`make_case` with queries, keys and unit negatives of this type and fp32 weights and velocity."""
    case = make_case(*args, **kwargs)
    return case.to(dtype)._replace(w_KD=case.w_KD.float(), v_KD=case.v_KD.float())


def check_score_of(case: Case, adversary_temperature: float = ADVERSARY_TEMPERATURE) -> None:
    truth = score(reference, case.to(torch.float64), adversary_temperature)
    plain = score(reference, case, adversary_temperature)
    check_score(score(gpu, case, adversary_temperature), plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("queries", "negatives"), SIZES)
def test_as_exact_as_plain_pytorch(queries: int, negatives: int, dtype: torch.dtype) -> None:
    for keys in (0, queries, 2 * queries):
        case = narrow_case(dtype, queries, keys, negatives, 64)
        check_score_of(case)
    wide = case.to(torch.float64)
    coef_N = 1 / (score(reference, wide).za_N * queries)
    plain = changed(*step(reference, case, coef_N.float()))
    truth = changed(*step(reference, wide, coef_N))
    for name, got in changed(*step(gpu, case, coef_N.float())).items():
        assert got.dtype == (dtype if name == "n" else torch.float32)
        check_as_exact_as_plain(name, got, plain[name], truth[name], slack=3e-6)


@pytest.mark.parametrize("dim", [32, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dimension(dtype: torch.dtype, dim: int) -> None:
    case = narrow_case(dtype, 33, 33, 100, dim)
    check_score_of(case)
    coef_N = 1 / (score(reference, case).za_N * 33)
    truth = changed(*step(reference, case, coef_N))
    for name, got in changed(*step(gpu, case, coef_N)).items():
        # The same formula but for the order of sums; fp16 unit rows may round to either neighbour.
        rtol = 2e-3 if name == "n" and dtype is torch.float16 else 2e-5
        torch.testing.assert_close(got, truth[name], rtol=rtol, atol=1e-5)


def test_bf16() -> None:
    case = narrow_case(torch.bfloat16, 17, 17, 255, 64)
    check_score_of(case)
    coef_N = 1 / (score(reference, case).za_N * 17)
    truth = changed(*step(reference, case, coef_N))
    for name, got in changed(*step(gpu, case, coef_N)).items():
        assert got.dtype == (torch.bfloat16 if name == "n" else torch.float32)
        torch.testing.assert_close(got, truth[name], rtol=1e-2 if name == "n" else 2e-5, atol=1e-5)


@pytest.mark.parametrize("own", ["none", "absent", "own"])
@pytest.mark.parametrize("keys", [0, 17, 130])
def test_own_keys(keys: int, own: str) -> None:
    check_score_of(make_case(17, keys, 40, 32, own).to(torch.float32))


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five tiles of 64, three splits take 2 + 2 + 1 and eight leave three idle; keys have a single tile."""
    monkeypatch.setattr("kernels.score.num_splits", lambda *_: splits)
    case = make_case(17, 17, 257, 64).to(torch.float16)
    check_score_of(case)
    first, second = score(gpu, case), score(gpu, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_splits_fill_the_processors() -> None:
    cpu = torch.device("cpu")  # taken for a device of eight
    assert num_splits(8, 100, cpu) == 1
    assert num_splits(2, 100, cpu) == 4  # eight programs of 25 tiles
    assert num_splits(2, 3, cpu) == 3  # no more parts than tiles
    assert num_splits(12, 100, cpu) == 2  # 24 programs in three turns of 50 tiles instead of 12 in two of 100


@pytest.mark.parametrize("adversary_temperature", [0.03, 0.05, 0.12, 0.2])
def test_other_ratios_of_temperatures(adversary_temperature: float) -> None:
    check_score_of(make_case(17, 34, 255, 32).to(torch.float32), adversary_temperature)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("game", GAMES)
def test_first_step_of_the_independent_implementation(game: str, world: int) -> None:
    check_first_step(gpu, game, world)


def test_an_empty_shard() -> None:
    case = make_case(17, 17, 0, 32).to(torch.float32)
    check_score_of(case)
    nothing = score(gpu, case._replace(k_MD=case.k_MD[:0], own_N=None))
    assert torch.equal(nothing.z_N, torch.zeros(17))
    assert torch.equal(nothing.o_ND, torch.zeros(17, 32))
    assert torch.equal(nothing.top_N, torch.full((17,), float("-inf")))
    _, stats = step(gpu, case, torch.ones(17))
    assert stats.mass_K.shape == stats.grad_K.shape == (0,)


def test_the_step_changes_the_bank_in_place_and_nothing_else() -> None:
    case = make_case(17, 17, 100, 32).to(torch.float32)
    before = [t.clone() for t in case if t is not None]
    gpu.adversary_step(
        case.q_ND,
        torch.full((17,), 1e-20),
        case.n_KD,
        case.w_KD,
        case.v_KD,
        temperature=ADVERSARY_TEMPERATURE,
        lr=1.0,
        momentum=0.9,
        weight_decay=0.0,
    )
    same = [torch.equal(t, old) for t, old in zip((t for t in case if t is not None), before, strict=True)]
    assert same == [True, True, True, False, False, False]  # q, k, own; n, W, v


def test_a_row_of_no_weight_counts_for_nothing() -> None:
    case = make_case(17, 17, 100, 32).to(torch.float32)
    coef_N = torch.full((17,), 1e-20)
    coef_N[5:] = 0
    without = changed(*step(gpu, case._replace(q_ND=case.q_ND[:5]), coef_N[:5]))
    torch.testing.assert_close(changed(*step(gpu, case, coef_N)), without)


def test_chosen_by_name() -> None:
    assert implementation("triton") is gpu


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (48, torch.float32, r"dimension 48, the triton kernels need one of \(32, 64, 128, 256, 512\)"),
        (64, torch.float64, r"type torch.float64, the triton kernels need one of \(torch.bfloat16, "),
    ],
)
def test_what_does_not_fit_is_refused(dim: int, dtype: torch.dtype, message: str) -> None:
    case = make_case(4, 4, 6, dim).to(dtype)
    with pytest.raises(ValueError, match="score: got " + message):
        gpu.score(case.q_ND, case.k_MD, None, case.n_KD, TEMPERATURE, ADVERSARY_TEMPERATURE)
    with pytest.raises(ValueError, match="adversary_step: got " + message):
        step(gpu, case, torch.ones(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(w_KD=c.w_KD[:3]), r"shape \[\(4, 32\), \(6, 32\), \(3, 32\), \(6, 32\)\]"),
        (lambda c: c._replace(q_ND=c.q_ND[:3]), r"coef has shape \(4,\), need \[3\]"),
        (lambda c: c._replace(n_KD=c.n_KD.half()), r"need q and n the same, w and v float32"),
        (lambda c: c._replace(v_KD=c.v_KD.half()), r"need q and n the same, w and v float32"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    case = change(make_case(4, 4, 6, 32).to(torch.float32))
    with pytest.raises(ValueError, match=message):
        step(gpu, case, torch.ones(4))


def test_a_bank_in_columns_is_refused() -> None:
    case = make_case(4, 4, 6, 32).to(torch.float32)
    with pytest.raises(ValueError, match="updated in place and need contiguous memory"):
        gpu.adversary_step(
            case.q_ND,
            torch.ones(4),
            case.n_KD,
            case.w_KD.T.contiguous().T,
            case.v_KD,
            temperature=ADVERSARY_TEMPERATURE,
            lr=1.0,
            momentum=0.9,
            weight_decay=0.0,
        )
