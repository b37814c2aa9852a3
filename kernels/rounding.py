"""Stochastic rounding to bf16: up or down at random so that the expected value is the number itself.

A bf16 number has 8 significant bits, so a step smaller than a 256th part of a weight would always be rounded away; at
random it is taken in its share of the cases. The random bits are a function of a seed, the number of the row in the
whole bank and the column: the same for any placement, tile size and implementation.

Hash: lowbias32 by Chris Wellons, public domain (https://nullprogram.com/blog/2018/07/31/). K rows, D columns.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as signed 32-bit numbers, of which torch has all operations
COLUMN_STEP = 0x9E3779B9  # 2^32 over the golden ratio: spreads the columns' numbers over all bits


def random_bits(seed: int, first: int, rows: int, dim: int, device: torch.device) -> Tensor:
    """int32 [rows, dim]: 32 random bits for each element of the rows from number `first` on."""
    number_K1 = torch.arange(first, first + rows, device=device).to(torch.int32)[:, None]
    column_D = (torch.arange(dim, device=device) * COLUMN_STEP).to(torch.int32)
    return _hash(_hash(number_K1 ^ _signed(seed32(seed))) + column_D)


def round_to_bf16(x_KD: Tensor, bits_KD: Tensor) -> Tensor:
    """fp32 [K, D] as bf16, by the lower 16 of the random bits."""
    exact_KD = ((x_KD.view(torch.int32) + (bits_KD & 0xFFFF)) & -0x10000).view(torch.float32)
    return exact_KD.to(torch.bfloat16)


def seed32(seed: int) -> int:
    """An unsigned 32-bit number that all bits of `seed` go into."""
    return (seed ^ seed >> 32) & 0xFFFFFFFF


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def _hash(x: Tensor) -> Tensor:
    """int32; the shifts of the hash are those of unsigned numbers, hence the masks."""
    x = x ^ (x >> 16 & 0xFFFF)
    x.mul_(_MULTIPLIERS[0])
    x ^= x >> 15 & 0x1FFFF
    x.mul_(_MULTIPLIERS[1])
    x ^= x >> 16 & 0xFFFF
    return x
