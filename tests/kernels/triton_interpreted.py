"""The Triton kernels in Triton's interpreter against the specification; run by `test_triton.py`.

The interpreter has no tf32 or bf16 products: it multiplies in fp32 where a GPU would round the factors.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import AdversaryParams, chunked, ops, reference
from kernels.triton import tiles
from kernels.triton.tiles import best_splits, num_splits
from tests.kernels.cases import (
    ADVERSARY_TEMPERATURE,
    TEMPERATURE,
    Case,
    changed,
    check_score,
    check_skip,
    check_step,
    make_case,
    score,
    step,
    use_wide_tiles,
)
from tests.kernels.test_golden import VARIANTS, check_first_step

gpu = ops.triton_kernels()
SIZES = [(1, 1), (1, 1000), (17, 255), (255, 17), (64, 256), (300, 1000)]  # queries, negatives


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict(tiles.TABLE)
    use_wide_tiles(table)
    monkeypatch.setattr(tiles, "TABLE", table)


def narrow_case(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Case:
    """Make a case with queries, keys and unit negatives of this dtype and fp32 weights and velocity."""
    case = make_case(*args, **kwargs)
    return case.to(dtype)._replace(w_KD=case.w_KD.float(), v_KD=case.v_KD.float())


def check_score_of(case: Case, adversary_temperature: float = ADVERSARY_TEMPERATURE) -> None:
    truth = score(reference, case.to(torch.float64), adversary_temperature)
    plain = score(reference, case, adversary_temperature)
    check_score(score(gpu, case, adversary_temperature), plain, truth)


@pytest.mark.usefixtures("wide_tiles")
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
    got = changed(*step(gpu, case, coef_N.float()))
    assert all(value.dtype == (dtype if name == "n" else torch.float32) for name, value in got.items())
    check_step(got, plain, truth)


@pytest.mark.parametrize("dim", [32, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_dimension(dtype: torch.dtype, dim: int) -> None:
    case = narrow_case(dtype, 33, 33, 100, dim)
    check_score_of(case)
    coef_N = 1 / (score(reference, case).za_N * 33)
    truth = changed(*step(reference, case, coef_N))
    for name, got in changed(*step(gpu, case, coef_N)).items():
        # Only the order of sums differs; fp16 unit rows may round to either neighbour.
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


@pytest.mark.parametrize("keys", [17, 130])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits(splits: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of five tiles of 64 negatives and one or three tiles of keys contain keys, negatives or both."""
    monkeypatch.setattr("kernels.triton.score.num_splits", lambda *_: splits)
    case = make_case(17, keys, 257, 64).to(torch.float16)
    check_score_of(case)
    first, second = score(gpu, case), score(gpu, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_splits_fill_the_processors() -> None:
    cpu = torch.device("cpu")  # counts as a device of eight processors
    assert num_splits(8, 100, cpu) == 1
    assert num_splits(2, 100, cpu) == 4  # eight programs of 25 tiles
    assert num_splits(2, 3, cpu) == 3  # no more splits than tiles
    assert num_splits(12, 100, cpu) == 2  # 24 programs in three rounds of 50 tiles instead of 12 in two of 100
    assert best_splits(2, 1024, 108) == 52  # 16 splits of two row tiles would leave 76 of 108 processors idle
    assert best_splits(256, 1536, 108) == 2  # eight splits would be 5 % faster and take four times the memory
    assert best_splits(0, 3, 132) == best_splits(3, 0, 132) == 1


@pytest.mark.parametrize("adversary_temperature", [0.03, 0.05, 0.12, 0.2])
def test_other_ratios_of_temperatures(adversary_temperature: float) -> None:
    check_score_of(make_case(17, 34, 255, 32).to(torch.float32), adversary_temperature)


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_step_of_the_independent_implementation(variant: str, world_size: int) -> None:
    check_first_step(gpu, variant, world_size)


def test_no_negatives() -> None:
    check_score_of(make_case(17, 17, 0, 32).to(torch.float32))


def test_more_rows_add_up_the_gradients_of_micro_batches() -> None:
    """From v = 0, without decay, the new velocity is the gradient; gradients of two halves add up to that of all."""
    case = make_case(34, 34, 100, 64).to(torch.float32)
    case = case._replace(v_KD=torch.zeros_like(case.v_KD))
    coef_N = 1 / (score(reference, case).za_N * 34)
    halves = [slice(0, 20), slice(20, 34)]  # neither fills a tile

    def gradient(part: slice) -> Tensor:
        return moved(gpu, case._replace(q_ND=case.q_ND[part]), coef_N[part], weight_decay=0.0).v_KD

    torch.testing.assert_close(gradient(slice(0, 34)), gradient(halves[0]) + gradient(halves[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("w_type", "v_type"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16)])
def test_random_rounding_is_the_same_bit_for_bit(w_type: torch.dtype, v_type: torch.dtype | None) -> None:
    """With queries of weight 0 only decay and momentum act, whose arithmetic has no sums."""
    case = stored(make_case(17, 17, 100, 64).to(torch.float32), w_type, v_type)
    options = {"seed": 2**40 + 2**31 + 5, "first": 2**32 - 50}  # row indices that overflow 32 bits
    got, expected = (moved(kernels, case, torch.zeros(17), **options) for kernels in (gpu, reference))
    assert torch.equal(got.w_KD, expected.w_KD)
    if v_type is not None:
        assert torch.equal(got.v_KD, expected.v_KD)
        other = moved(gpu, case, torch.zeros(17), seed=6, first=0)
        assert not torch.equal(other.w_KD, got.w_KD)
        assert not torch.equal(other.v_KD, got.v_KD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_type", [torch.float32, torch.bfloat16, None])
def test_bf16_weights(dtype: torch.dtype, v_type: torch.dtype | None) -> None:
    case = stored(narrow_case(dtype, 33, 33, 257, 128), torch.bfloat16, v_type)
    coef_N = 1 / (score(reference, case).za_N * 33)
    got, expected = (moved(kernels, case, coef_N, seed=7, first=3) for kernels in (gpu, reference))
    for name in ("w_KD", "v_KD") if v_type else ("w_KD",):
        x, y = getattr(got, name).float(), getattr(expected, name).float()
        # Sums in another order sometimes round to the next bf16 number.
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-5)
        if getattr(got, name).dtype == torch.bfloat16:
            assert (x != y).float().mean() < 2e-3
    # Unit rows are computed from the stored weights.
    n_KD = torch.nn.functional.normalize(got.w_KD.float(), dim=1)
    torch.testing.assert_close(got.n_KD.float(), n_KD, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)


def stored(case: Case, w_type: torch.dtype, v_type: torch.dtype | None) -> Any:
    """Return the case with weights and velocity of these dtypes, or without velocity."""
    v_KD: Any = None if v_type is None else case.v_KD.to(v_type)
    return case._replace(w_KD=case.w_KD.to(w_type), v_KD=v_KD)


def moved(kernels: Any, case: Any, coef_N: Tensor, weight_decay: float = 1e-2, seed: int = 0, first: int = 0) -> Any:
    """Return a copy of the case after a step."""
    n_KD, w_KD, v_KD = (None if x is None else x.clone() for x in (case.n_KD, case.w_KD, case.v_KD))
    kernels.adversary_step(
        case.q_ND,
        coef_N,
        n_KD,
        w_KD,
        v_KD,
        AdversaryParams(ADVERSARY_TEMPERATURE, 0.3, 0.9, weight_decay),
        seed=seed,
        first=first,
    )
    return case._replace(n_KD=n_KD, w_KD=w_KD, v_KD=v_KD)


def test_as_torch_operators() -> None:
    """Run torch.library.opcheck's tests of schema, aliases and fake tensors."""
    case = make_case(17, 17, 40, 32).to(torch.float32)
    checks = ("test_schema", "test_faketensor")
    arguments = (*case[:4], TEMPERATURE, ADVERSARY_TEMPERATURE)
    torch.library.opcheck(torch.ops.adco.score.default, arguments, test_utils=checks)
    q_ND, coef_N, lr = case.q_ND, torch.full((17,), 1e-20), torch.tensor(3.0)
    for w_KD, v_KD in ((case.w_KD, case.v_KD), (case.w_KD.bfloat16(), None)):
        torch.library.opcheck(
            torch.ops.adco.adversary_step.default,
            (q_ND, coef_N, case.n_KD, w_KD, v_KD, [ADVERSARY_TEMPERATURE, 0.9, 1e-4], lr, torch.tensor(1), 2),
            test_utils=checks,
        )


def test_the_step_changes_the_bank_in_place_and_nothing_else() -> None:
    case = make_case(17, 17, 100, 32).to(torch.float32)
    before = [t.clone() for t in case if t is not None]
    gpu.adversary_step(
        case.q_ND,
        torch.full((17,), 1e-20),
        case.n_KD,
        case.w_KD,
        case.v_KD,
        AdversaryParams(ADVERSARY_TEMPERATURE, 1.0, 0.9, 0.0),
    )
    same = [torch.equal(t, old) for t, old in zip((t for t in case if t is not None), before, strict=True)]
    assert same == [True, True, True, False, False, False]  # q, k, own; n, W, v


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_no_bit(weights: torch.dtype) -> None:
    case = make_case(17, 17, 100, 32).to(torch.float32)
    case = case._replace(w_KD=case.w_KD.to(weights))
    for v_KD in (case.v_KD, None):
        check_skip(gpu, case, v_KD)


def test_a_row_of_no_weight_counts_for_nothing() -> None:
    case = make_case(17, 17, 100, 32).to(torch.float32)
    coef_N = torch.full((17,), 1e-20)
    coef_N[5:] = 0
    without = changed(*step(gpu, case._replace(q_ND=case.q_ND[:5]), coef_N[:5]))
    torch.testing.assert_close(changed(*step(gpu, case, coef_N)), without)


def test_the_interpreter_runs_the_operators(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A CPU runs the Triton kernels; queries that these do not take go to `chunked`, with one warning."""
    monkeypatch.setattr(chunked, "score", None)
    case = make_case(17, 17, 40, 32).to(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(score(kernels, case), score(gpu, case), strict=True))

    monkeypatch.undo()
    monkeypatch.setattr(ops, "triton_kernels", None)
    for case in (make_case(4, 4, 6, 48).to(torch.float32), make_case(4, 4, 6, 32)):
        for _ in range(2):
            assert all(torch.equal(x, y) for x, y in zip(score(kernels, case), score(chunked, case), strict=True))
    slower = "using the slower PyTorch implementation"
    assert [record.getMessage().endswith(slower) for record in caplog.records] == [True, True]
    assert "dimension 48" in caplog.text
    assert "type torch.float64" in caplog.text


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


def test_the_contract_is_checked() -> None:
    case = make_case(4, 4, 6, 32).to(torch.float32)
    with pytest.raises(ValueError, match=r"score: negatives have strides \(1, 6\), need contiguous rows"):
        score(gpu, case._replace(n_KD=case.n_KD.T.contiguous().T))
    with pytest.raises(ValueError, match=r"adversary_step: weights have shape \[3, 32\], need that of the negatives"):
        step(gpu, case._replace(w_KD=case.w_KD[:3]), torch.ones(4))
