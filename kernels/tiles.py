"""How the Triton kernels cut their work: tile sizes, warps and stages by architecture, dimension and type.

A table instead of autotuning: the choice is known before the first step, the same on every rank and in every run,
and each entry can be compiled ahead of time and looked at (`tests/kernels/triton_compiled.py`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DIMS = (32, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Set in the environment before Triton kernels are imported, it makes them run on the CPU, slowly.
INTERPRETED: bool = triton.knobs.runtime.interpret

# At most so many parts of the columns: each holds N x D partial sums.
_MAX_SPLITS = 16
_INTERPRETER_PROCESSORS = 8  # only so that the interpreter splits, too


class Tiles(NamedTuple):
    """How one program works.

    rows: that it keeps (queries in `score`, negatives in `adversary_step`). columns: that it takes in one turn of its
    loop (columns; queries). warps, stages: Triton's num_warps and num_stages.
    """

    rows: int
    columns: int
    warps: int
    stages: int


class Products(NamedTuple):
    """Types and precision in which a kernel multiplies matrices, always adding in fp32; see `products`."""

    similarity: tl.dtype
    weighted: tl.dtype
    precision: str


# By kernel, architecture (8: sm_80, 9: sm_90), bytes of an element and dimension.
_TABLE: dict[tuple[str, int, int], dict[int, Tiles]] = {
    ("score", 8, 2): {
        32: Tiles(128, 64, 8, 3),
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 64, 8, 2),
        512: Tiles(32, 32, 8, 2),
    },
    ("score", 9, 2): {
        32: Tiles(128, 64, 8, 3),
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(128, 64, 8, 2),
        512: Tiles(64, 32, 8, 2),
    },
    ("score", 8, 4): {
        32: Tiles(64, 32, 8, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 16, 8, 2),
    },
    ("adversary", 8, 2): {
        32: Tiles(128, 64, 8, 3),
        64: Tiles(128, 64, 8, 3),
        128: Tiles(64, 64, 8, 3),
        256: Tiles(32, 64, 8, 2),
        512: Tiles(16, 32, 8, 2),
    },
    ("adversary", 9, 2): {
        32: Tiles(64, 64, 8, 3),
        64: Tiles(64, 64, 8, 3),
        128: Tiles(64, 64, 8, 3),
        256: Tiles(64, 64, 8, 2),  # spills, but not in the loop; 32 rows would not, but have no HGMMA
        512: Tiles(16, 32, 8, 2),
    },
    ("adversary", 8, 4): {
        32: Tiles(64, 32, 8, 2),
        64: Tiles(64, 32, 8, 2),
        128: Tiles(32, 32, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 16, 8, 2),
    },
    ("hardest", 8, 2): {
        32: Tiles(64, 64, 8, 3),
        64: Tiles(64, 64, 8, 3),
        128: Tiles(64, 64, 8, 3),
        256: Tiles(64, 64, 8, 2),
        512: Tiles(32, 32, 8, 2),
    },
    ("hardest", 9, 2): {
        32: Tiles(64, 64, 8, 3),
        64: Tiles(64, 64, 8, 3),
        128: Tiles(64, 64, 8, 3),
        256: Tiles(64, 64, 8, 2),
        512: Tiles(32, 32, 8, 2),
    },
    ("hardest", 8, 4): {
        32: Tiles(32, 32, 8, 3),
        64: Tiles(32, 32, 8, 3),
        128: Tiles(32, 32, 8, 3),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(32, 32, 8, 2),
    },
}


def tiles(kernel: str, major: int, dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of `score`, `adversary` or `hardest` for an architecture's major number and a dimension of DIMS."""
    # fp32 does not use what is new in sm_90; of the later architectures, sm_12x has as little shared memory as sm_86.
    table = 9 if major in (9, 10) and dtype.itemsize == 2 else 8
    return _TABLE[kernel, table, dtype.itemsize][dim]


def products(dtype: torch.dtype, interpreted: bool = INTERPRETED) -> Products:
    """How to multiply elements of this type on tensor cores.

    similarity, of q . c: the type itself. weighted, of sums of p_ij c_j: bf16 rounds p to 8 bits as flash attention
    does; the adversary's p leaves fp16's range, so there both factors become tf32, which has fp16's 11 bits and
    fp32's range. fp32 is multiplied as it is ("ieee", no tensor cores), so that the interpreter's tests hold for it;
    for speed take bf16. The interpreter has no bf16 arithmetic and computes in fp32 instead.
    """
    if dtype is torch.bfloat16:
        return Products(tl.float32, tl.float32, "ieee") if interpreted else Products(tl.bfloat16, tl.bfloat16, "tf32")
    if dtype is torch.float16:
        return Products(tl.float16, tl.float32, "tf32")
    return Products(tl.float32, tl.float32, "ieee")


def check(name: str, q_ND: Tensor) -> None:
    """Raise ValueError unless the kernels take queries of this dimension, type and device."""
    if q_ND.shape[1] not in DIMS:
        raise ValueError(f"{name}: got dimension {q_ND.shape[1]}, the triton kernels need one of {DIMS}")
    if q_ND.dtype not in DTYPES:
        raise ValueError(f"{name}: got type {q_ND.dtype}, the triton kernels need one of {DTYPES}")
    if not q_ND.is_cuda and not INTERPRETED:
        raise ValueError(f"{name}: got tensors on {q_ND.device}, the triton kernels need a CUDA device")


def architecture(device: torch.device) -> int:
    """Major number of the device's compute capability, at least 8, else ValueError; the interpreter is taken as 8."""
    if device.type != "cuda":
        return 8
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"got a device of sm_{major}{minor}, the triton kernels need sm_80 or newer")
    return major


def num_splits(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """In how many parts to walk the columns so that row tiles x parts fill the device's processors evenly.

    The time of a choice is the number of turns the processors take times the tiles walked in each; of equal ones,
    the fewest parts.
    """
    processors = _INTERPRETER_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    choices = range(1, min(_MAX_SPLITS, column_tiles) + 1)
    return min(choices, key=lambda splits: -(-row_tiles * splits // processors) * -(-column_tiles // splits))
