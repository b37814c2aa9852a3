"""Stochastic rounding to bf16: rounds up or down at random so that the expected value is the number itself.

A bf16 number has 8 significant bits, so rounding to nearest would always discard a step smaller than 1/256 of the
weight. Stochastic rounding takes such a step in the matching share of cases. The random bits are a function of the
seed, the row's index in the whole bank and the column, so they are the same for any placement, tile size and
implementation.

The hash is lowbias32 by Chris Wellons, public domain (https://nullprogram.com/blog/2018/07/31/).
Shape suffixes: K rows, D columns.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as signed numbers: torch has few operations on unsigned ones
COLUMN_STEP = 0x9E3779B9  # 2^32 divided by the golden ratio: spreads the column indices over all bits


def random_bits(seed: int | Tensor, first: int, rows: int, dim: int, device: torch.device) -> Tensor:
    """Return 32 random bits, int32 [rows, dim], for each element of the rows from index `first` on."""
    return row_bits(seed, torch.arange(first, first + rows, device=device), dim)


def row_bits(seed: int | Tensor, row_K: Tensor, dim: int) -> Tensor:
    """Return 32 random bits, int32 [K, dim], for each element of the rows with these indices in the whole bank.

    The seed is a number, or an int64 scalar on the device, which the host does not read.
    """
    column_D = (torch.arange(dim, device=row_K.device) * COLUMN_STEP).to(torch.int32)
    return _hash(_hash(row_K.to(torch.int32)[:, None] ^ seed32(torch.as_tensor(seed)).to(torch.int32)) + column_D)


def round_to_bf16(x_KD: Tensor, bits_KD: Tensor) -> Tensor:
    """Round fp32 [K, D] to bf16 by the lower 16 of the random bits."""
    exact_KD = ((x_KD.view(torch.int32) + (bits_KD & 0xFFFF)) & -0x10000).view(torch.float32)
    # NaN has to remain NaN: the sum of that of a GPU, 0x7FFFFFFF, overflows into the sign.
    return torch.where(x_KD.isnan(), x_KD, exact_KD).to(torch.bfloat16)


def seed32(seed: Tensor) -> Tensor:
    """Fold all bits of int64 numbers into unsigned 32-bit numbers."""
    return (seed ^ seed >> 32) & 0xFFFFFFFF


def _hash(x: Tensor) -> Tensor:
    """Hash int32 numbers. The masks make the arithmetic shifts equal to the hash's unsigned ones."""
    x = x ^ (x >> 16 & 0xFFFF)
    x.mul_(_MULTIPLIERS[0])
    x ^= x >> 15 & 0x1FFFF
    x.mul_(_MULTIPLIERS[1])
    x ^= x >> 16 & 0xFFFF
    return x
