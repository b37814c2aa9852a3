"""The common part of all kernels: the registration per device and the checks of arguments."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import kernels
from kernels import AdversaryParams, check_temperature, chunked, ops, reference
from tests.kernels.cases import Case, make_case, score, step


def test_a_cpu_runs_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(5, 3, 7, 32)
    calls = []

    def spy(*args: Any) -> kernels.Score:
        calls.append(args)
        return reference.score(*args)

    monkeypatch.setattr(chunked, "score", spy)
    torch.testing.assert_close(score(kernels, case)._asdict(), score(reference, case)._asdict())
    assert len(calls) == 1


def test_a_gpu_without_triton_runs_chunked_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kernels.triton.tiles.unsupported", lambda q_ND: "got a device of sm_75")
    case = make_case(5, 3, 7, 32)
    for _ in range(2):
        got = ops._run_triton("score", case.q_ND, case.k_MD, case.own_N, case.n_KD, 0.12, 0.02)
        torch.testing.assert_close(got, tuple(score(reference, case)))
    assert [record.getMessage() for record in caplog.records] == [
        "got a device of sm_75: using the slower PyTorch implementation"
    ]


@pytest.mark.parametrize("temperature", [0.02, 0.12, 1.0])
def test_temperatures_in_use_pass(temperature: float) -> None:
    check_temperature(temperature, 2**20)


@pytest.mark.parametrize("temperature", [0.0, -0.1, 0.01])
def test_temperatures_that_overflow_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"overflow fp32; need at least 0\.0135") as caught:
        check_temperature(temperature, 65536)
    assert f"temperature {temperature:g} with 65536 negatives" in str(caught.value)


def test_the_least_temperature_fits_fp32() -> None:
    columns, least = 65536, 0.0136
    check_temperature(least, columns)
    assert torch.isfinite(columns * torch.exp(torch.tensor(1 / least)))


def columns(case: Case) -> Case:
    """Return the case with the queries in column-major order."""
    return case._replace(q_ND=case.q_ND.T.contiguous().T)


@pytest.mark.parametrize("implementation", [reference, chunked])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(q_ND=c.q_ND[0]), r"queries are torch\.float32 of shape \[32\], need floating rows"),
        (
            lambda c: c._replace(n_KD=c.n_KD.long()),
            r"negatives are torch\.int64 of shape \[6, 32\], need floating rows",
        ),
        (lambda c: c._replace(k_MD=c.k_MD[:, :9].clone()), r"keys have dimension 9, need that of the queries, 32"),
        (lambda c: c._replace(n_KD=c.n_KD[:, :7].clone()), r"negatives have dimension 7, need that of the queries, 32"),
        (lambda c: c._replace(k_MD=c.k_MD.half()), r"keys have type torch\.float16, need .* torch\.float32"),
        (lambda c: c._replace(n_KD=c.n_KD.bfloat16()), r"negatives have type torch\.bfloat16, need .* torch\.float32"),
        (lambda c: c._replace(n_KD=c.n_KD.to("meta")), r"negatives have device meta, need that of the queries, cpu"),
        (lambda c: c._replace(own_N=torch.zeros(3).long()), r"own is torch\.int64 of shape \[3\], need .* \[4\]"),
        (lambda c: c._replace(own_N=torch.zeros(4)), r"own is torch\.float32 of shape \[4\], need contiguous int64"),
        (lambda c: c._replace(k_MD=c.k_MD[:0], n_KD=c.n_KD[:0]), r"got no keys and an empty bank, need at least one"),
        (columns, r"queries have strides \(1, 4\), need contiguous rows"),
    ],
)
def test_score_refuses(change: Callable[[Case], Case], message: str, implementation: Any) -> None:
    case = change(make_case(4, 4, 6, 32).to(torch.float32))
    with pytest.raises(ValueError, match="^score: " + message):
        score(implementation, case)


@pytest.mark.parametrize("implementation", [reference, chunked])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (columns, r"queries have strides \(1, 4\), need contiguous rows"),
        (lambda c: c._replace(n_KD=c.n_KD.half()), r"negatives have type torch\.float16, need .* torch\.float32"),
        (lambda c: c._replace(q_ND=c.q_ND[:3]), r"coef has shape \(4,\), need \[3\]"),
        (lambda c: c._replace(w_KD=c.w_KD[:3]), r"weights have shape \[3, 32\], need that of the negatives \[6, 32\]"),
        (lambda c: c._replace(v_KD=c.v_KD.half()), r"velocity have type torch\.float16, need torch\.float32 or .*bf"),
        (
            lambda c: c._replace(w_KD=c.w_KD.T.contiguous().T),
            r"weights are not contiguous rows on cpu, and are updated",
        ),
        (lambda c: c._replace(n_KD=c.n_KD[:0], w_KD=c.w_KD[:0], v_KD=c.v_KD[:0]), r"got an empty bank, need at least"),
    ],
)
def test_adversary_step_refuses(change: Callable[[Case], Case], message: str, implementation: Any) -> None:
    case = change(make_case(4, 4, 6, 32).to(torch.float32))
    with pytest.raises(ValueError, match="^adversary_step: " + message):
        step(implementation, case, torch.ones(4))


@pytest.mark.parametrize("skip", [torch.tensor(1), torch.tensor([True])])
@pytest.mark.parametrize("implementation", [reference, chunked])
def test_skip_must_be_a_bool_scalar(implementation: Any, skip: Tensor) -> None:
    case = make_case(4, 4, 6, 32)
    with pytest.raises(ValueError, match=r"^adversary_step: skip is torch.* need a bool scalar on cpu"):
        implementation.adversary_step(
            case.q_ND, torch.ones(4), case.n_KD, case.w_KD, None, AdversaryParams(0.02, 3.0, 0.0, 0.0), skip=skip
        )


@pytest.mark.parametrize("implementation", [reference, chunked])
def test_rows_that_are_not_unit_are_found_in_debug_mode(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, 4, 6, 32).to(torch.float32)
    case.n_KD[5] *= 1.1

    score(implementation, case)
    monkeypatch.setenv("TRAINER_DEBUG", "1")
    with pytest.raises(ValueError, match=r"row 5 of the negatives has norm 1\.1, need unit rows"):
        score(implementation, case)
    case.n_KD[5] = math.nan
    with pytest.raises(ValueError, match=r"row 5 of the negatives has norm nan, need unit rows"):
        score(implementation, case)
    case.n_KD[5] = torch.nn.functional.normalize(torch.ones(32), dim=0)
    score(implementation, case.to(torch.bfloat16))  # unit rows up to rounding


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(weights: torch.dtype) -> None:
    """Run torch.library.opcheck's tests of schema, mutation, aliases and fake tensors."""
    case = make_case(5, 3, 7, 32).to(torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.adco.score.default, (case.q_ND, case.k_MD, case.own_N, case.n_KD, 0.12, 0.02), test_utils=tests
    )
    torch.library.opcheck(torch.ops.adco.hardest.default, (case.q_ND, case.n_KD, case.own_N, 2, 0.5), test_utils=tests)
    w_KD, coef_N, lr = case.w_KD.to(weights), torch.ones(5), torch.tensor(3.0)
    for v_KD, skip in ((case.v_KD, False), (None, True)):
        torch.library.opcheck(
            torch.ops.adco.adversary_step.default,
            (case.q_ND, coef_N, case.n_KD, w_KD, v_KD, [0.02, 0.9, 1e-4], lr, torch.tensor(0), 0, torch.tensor(skip)),
            test_utils=tests,
        )


def test_compiles_as_one_graph() -> None:
    case = make_case(5, 3, 7, 32).to(torch.float32)

    def run(case: Case) -> tuple[Tensor, Tensor]:
        z = kernels.score(case.q_ND * 1.0, case.k_MD, case.own_N, case.n_KD, 0.12, 0.02)
        stats = kernels.adversary_step(
            case.q_ND, 1 / z.za_N, case.n_KD, case.w_KD, case.v_KD, AdversaryParams(0.02, 3.0, 0.9, 1e-4)
        )  # fmt: skip
        return z.z_N.log() + 1, stats.mass_K

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    copies = [case._replace(n_KD=case.n_KD.clone(), w_KD=case.w_KD.clone(), v_KD=case.v_KD.clone()) for _ in range(2)]
    for got, plain in zip(compiled(copies[0]), run(copies[1]), strict=True):
        torch.testing.assert_close(got, plain)
    assert torch.equal(copies[0].w_KD, copies[1].w_KD)
    assert not torch.equal(copies[0].w_KD, case.w_KD)


def test_fake_tensors_need_no_memory() -> None:
    with FakeTensorMode():
        q_ND, n_KD = torch.empty(4096, 128), torch.empty(2**33, 128)
        o_ND = kernels.score(q_ND, q_ND, None, n_KD, 0.12, 0.02).o_ND
        assert o_ND.shape == q_ND.shape
