"""Stochastic rounding of bf16 weights: the rounding itself, and that a bf16 bank moves like an fp32 bank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import AdversaryParams, chunked, reference
from kernels.rounding import random_bits, round_to_bf16, seed32
from tests.kernels.cases import ADVERSARY_TEMPERATURE, TEMPERATURE, make_case

CPU = torch.device("cpu")


def test_bits_depend_on_the_index_of_the_row_only() -> None:
    whole = random_bits(seed=7, first=0, rows=50, dim=33, device=CPU)
    assert torch.equal(random_bits(seed=7, first=20, rows=30, dim=33, device=CPU), whole[20:])
    assert not torch.equal(random_bits(seed=8, first=0, rows=50, dim=33, device=CPU), whole)
    assert len(set(seed32(torch.tensor([7, 7 + 2**40, 2**62 + 7])).tolist())) == 3
    assert torch.equal(random_bits(torch.tensor(2**40 + 7), 0, 5, 3, CPU), random_bits(2**40 + 7, 0, 5, 3, CPU))


def test_bits_are_even_and_independent() -> None:
    bits = random_bits(
        seed=3, first=2**31 - 500, rows=1000, dim=64, device=CPU
    )  # across the sign bit of 32-bit indices
    signs = torch.stack([(bits >> b & 1).double() * 2 - 1 for b in range(32)])
    deviation = bits.numel() ** -0.5
    assert signs.mean((1, 2)).abs().max() < 5 * deviation
    for shifted in (signs.roll(1, 2), signs.roll(1, 1), signs.roll(1, 0)):  # next column, next row, next bit
        assert (signs * shifted).mean((1, 2)).abs().max() < 5 * deviation


def test_rounds_to_a_neighbour_and_right_on_average() -> None:
    x = torch.linspace(-3, 3, 101)[:, None].expand(101, 4096).contiguous()
    rounded = round_to_bf16(x, random_bits(1, 0, 101, 4096, CPU)).float()
    gap = 2.0 ** (torch.frexp(x).exponent - 8)
    assert ((rounded - x).abs() < gap).all()
    assert ((rounded - x).mean(1) / gap[:, 0]).abs().max() < 5 * 0.5 / 64
    exact = torch.tensor([[0.0, 1.0, -2.5, float("inf")]])
    assert torch.equal(round_to_bf16(exact, random_bits(1, 0, 1, 4, CPU)).float(), exact)
    not_numbers = torch.tensor([[0x7FFFFFFF, 0x7FC00000, -1]], dtype=torch.int32).view(torch.float32)  # first: a GPU's
    most = torch.full((1, 3), 0xFFFF, dtype=torch.int32)
    assert round_to_bf16(not_numbers, most).isnan().all()


def steps(kernels: Any, weights: torch.dtype, velocity: torch.dtype | None, count: int) -> tuple[Tensor, list[Tensor]]:
    """Return the unit rows of a bank after some steps, and its stored tensors."""
    case = make_case(40, 0, 100, 32, own="none").to(torch.float32)
    w_KD = (0.3 * case.w_KD).to(weights)
    v_KD = None if velocity is None else torch.zeros_like(w_KD, dtype=velocity)
    n_KD = torch.nn.functional.normalize(w_KD.float(), dim=1)
    for i in range(count):
        za_N = kernels.score(case.q_ND, case.k_MD, None, n_KD, TEMPERATURE, ADVERSARY_TEMPERATURE).za_N
        kernels.adversary_step(
            case.q_ND,
            1 / (za_N * 40),
            n_KD,
            w_KD,
            v_KD,
            AdversaryParams(ADVERSARY_TEMPERATURE, 0.003 if velocity is not None else 0.03, 0.9, 1e-4),
            seed=i,
            first=17,
        )
    return n_KD, [w_KD] + ([] if v_KD is None else [v_KD])


@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_chunked_rounds_as_the_reference(weights: torch.dtype, velocity: torch.dtype | None) -> None:
    _, expected = steps(reference, weights, velocity, 1)
    _, got = steps(chunked, weights, velocity, 1)
    for x, y in zip(got, expected, strict=True):
        if x.dtype == torch.bfloat16:  # sums in another order may cross a random threshold
            assert (x != y).float().mean() < 2e-3
        torch.testing.assert_close(x.float(), y.float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, None])
def test_a_bf16_bank_moves_like_an_fp32_bank(velocity: torch.dtype | None) -> None:
    """The steps are far below the resolution of bf16: with rounding to nearest the bank would not move."""
    start, _ = steps(reference, torch.float32, velocity, 0)
    exact, _ = steps(reference, torch.float32, velocity, 100)
    got, _ = steps(chunked, torch.bfloat16, velocity, 100)
    moved = (exact - start).norm(dim=1)
    assert moved.mean() > 0.05
    assert (got - exact).norm(dim=1).mean() < 0.35 * moved.mean()
    along = ((got - start) * (exact - start)).sum() / moved.square().sum()
    assert float(along) == pytest.approx(1, abs=0.1)
