"""How the Triton kernels cut their work: tile sizes, warps and stages by architecture, dimension and type.

A table (`tiles.csv`) instead of autotuning: the choice is known before the first step, the same on every rank and in
every run, and each entry can be compiled ahead of time and looked at (`python -m trainer bench kernels --static`).
`python -m trainer bench kernels --tune` measures it anew on a GPU.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DIMS = (32, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TABLE_PATH = Path(__file__).with_name("tiles.csv")

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


class Key(NamedTuple):
    """What the table is asked for: kernel, architecture (80: sm_80), name of a type of DTYPES, dimension of DIMS."""

    kernel: str
    architecture: int
    dtype: str
    dim: int


class Products(NamedTuple):
    """Types and precision in which a kernel multiplies matrices, always adding in fp32; see `products`."""

    similarity: tl.dtype
    weighted: tl.dtype
    precision: str


def read_table(path: Path = TABLE_PATH) -> dict[Key, Tiles]:
    """The table of tiles."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            Key(row["kernel"], int(row["architecture"]), row["dtype"], int(row["dim"])): Tiles(
                *(int(row[name]) for name in Tiles._fields)
            )
            for row in csv.DictReader(file)
        }


def write_table(table: dict[Key, Tiles], path: Path = TABLE_PATH) -> None:
    """Write what `read_table` reads, sorted."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Key._fields + Tiles._fields)
        writer.writerows(key + tile for key, tile in sorted(table.items()))


TABLE = read_table()


def tiles(kernel: str, architecture: int, dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a kernel (`score`, `adversary`, `hardest`) for an `architecture` and a dimension of DIMS.

    Architectures that have no row of their own take those of sm_90 if they are alike (sm_90, sm_100), otherwise those
    of sm_80, which fit the shared memory of the smaller ones, too (sm_86, sm_89, sm_120).
    """
    name = str(dtype).removeprefix("torch.")
    alike = 90 if architecture // 10 in (9, 10) else 80
    return TABLE.get(Key(kernel, architecture, name, dim)) or TABLE[Key(kernel, alike, name, dim)]


def products(dtype: torch.dtype, dim: int = 0, interpreted: bool = INTERPRETED) -> Products:
    """How to multiply elements of this type on tensor cores.

    similarity, of q . c: the type itself. weighted, of sums of p_ij c_j: bf16 rounds p to 8 bits as flash attention
    does; the adversary's p leaves fp16's range, so there both factors become tf32, which has fp16's 11 bits and
    fp32's range. fp32 is cut into two tf32 numbers each, of whose four products the three largest are added: an error
    of about 2^-22 of |q| |c|, for a sixth of the speed of bf16. For kernels with a weighted sum of more than 128
    dimensions (`dim`) these pieces are more than the registers hold; there fp32 is multiplied as it is, without tensor
    cores. The interpreter has no bf16 arithmetic and computes in fp32 instead, as it does for all tf32.
    """
    if dtype is torch.bfloat16:
        return Products(tl.float32, tl.float32, "ieee") if interpreted else Products(tl.bfloat16, tl.bfloat16, "tf32")
    if dtype is torch.float16:
        return Products(tl.float16, tl.float32, "tf32")
    return Products(tl.float32, tl.float32, "tf32x3" if dim <= 128 else "ieee")


def check(name: str, q_ND: Tensor) -> None:
    """Raise ValueError unless the kernels take queries of this dimension, type and device."""
    if q_ND.shape[1] not in DIMS:
        raise ValueError(f"{name}: got dimension {q_ND.shape[1]}, the triton kernels need one of {DIMS}")
    if q_ND.dtype not in DTYPES:
        raise ValueError(f"{name}: got type {q_ND.dtype}, the triton kernels need one of {DTYPES}")
    if not q_ND.is_cuda and not INTERPRETED:
        raise ValueError(f"{name}: got tensors on {q_ND.device}, the triton kernels need a CUDA device")


def architecture(device: torch.device) -> int:
    """The device's compute capability, 80 for sm_80, at least that, else ValueError; the interpreter is taken as 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"got a device of sm_{major}{minor}, the triton kernels need sm_80 or newer")
    return 10 * major + minor


def num_splits(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """In how many parts to walk the columns so that row tiles x parts fill the device's processors evenly."""
    processors = _INTERPRETER_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return best_splits(row_tiles, column_tiles, processors)


def best_splits(row_tiles: int, column_tiles: int, processors: int) -> int:
    """`num_splits` for a number of processors.

    The time of a choice is the number of turns the processors take times the tiles walked in each; of equal ones,
    the fewest parts.
    """
    choices = range(1, min(_MAX_SPLITS, column_tiles) + 1)
    return min(choices, key=lambda splits: -(-row_tiles * splits // processors) * -(-column_tiles // splits))
