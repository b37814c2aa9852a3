"""What all kernels share: the choice of implementation, the checks of what users give."""

import pytest
import torch

from kernels import check_temperature, chunked, implementation, reference


def test_implementation_by_name() -> None:
    assert implementation("reference") is reference
    assert implementation("chunked") is chunked
    with pytest.raises(ValueError, match=r"kernels: got 'fast', need one of reference, chunked, triton"):
        implementation("fast")


def test_triton_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"triton needs a CUDA device, or TRITON_INTERPRET=1"):
        implementation("triton")


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


@pytest.mark.parametrize("kernels", [reference, chunked])
@pytest.mark.parametrize(
    ("q", "k", "n", "own", "message"),
    [
        ((4,), (4, 8), (6, 8), None, r"shape \[\(4,\), \(4, 8\), \(6, 8\)\], need \[N, D\], \[M, D\], \[K, D\]"),
        ((4, 8), (4, 9), (6, 8), None, r"dimensions \(8, 9, 8\), need the same"),
        ((4, 8), (4, 8), (6, 7), None, r"dimensions \(8, 8, 7\), need the same"),
        ((4, 8), (4, 8), (6, 8), 3, r"own has shape \(3,\), need \[4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    kernels: object, q: tuple[int, ...], k: tuple[int, ...], n: tuple[int, ...], own: int | None, message: str
) -> None:
    own_N = None if own is None else torch.zeros(own, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        kernels.score(torch.zeros(q), torch.zeros(k), own_N, torch.zeros(n), 0.12, 0.02)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernels", [reference, chunked])
def test_types_that_differ_are_refused(kernels: object) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"types \(torch.float32, torch.float16, torch.float32\), need the same"):
        kernels.score(x, x.half(), None, x, 0.12, 0.02)  # type: ignore[attr-defined]
