"""Launch parameters of the Triton kernels: tile sizes, warps and stages by architecture, dimension and dtype.

They come from a table (`tiles.csv`) instead of autotuning, so that they are known before the first step, are the same
on every rank and in every run, and can be compiled ahead of time (`python -m trainer bench kernels --static`).
`python -m trainer bench kernels --tune` measures the table on a GPU.

Importing this module does not import Triton, which a machine without a GPU need not have.
"""

import csv
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIMS = (32, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TABLE_PATH = Path(__file__).with_name("tiles.csv")

# Whether Triton's interpreter runs the kernels, slowly, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Each split of the columns has N x D partial sums. More than these only where the rows alone do not fill the device.
_MAX_SPLITS = 16
_GAIN = 0.94  # more splits have to take less than this share of the time
_INTERPRETER_PROCESSORS = 8  # so that the interpreter splits the columns, too


class Tiles(NamedTuple):
    """Launch parameters of one kernel.

    Attributes:
        rows: Rows that a program keeps (queries; negatives in `adversary_step`).
        columns: Columns of one iteration of its loop (queries in `adversary_step`).
        warps: Triton's num_warps.
        stages: Triton's num_stages.
    """

    rows: int
    columns: int
    warps: int
    stages: int


class Key(NamedTuple):
    """Key of the table: kernel, architecture (80 for sm_80), name of a dtype of DTYPES, dimension of DIMS."""

    kernel: str
    architecture: int
    dtype: str
    dim: int


class Products(NamedTuple):
    """Triton's types of the factors of a kernel's matrix products, which accumulate in fp32, see `products`.

    Attributes:
        similarity: Type of queries and columns in q . c.
        weighted: Type of the factors in sums of p_ij c_j.
        precision: Triton's input precision of fp32 factors.
    """

    similarity: Any
    weighted: Any
    precision: str


def read_table(path: Path = TABLE_PATH) -> dict[Key, Tiles]:
    """Read the table."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            Key(row["kernel"], int(row["architecture"]), row["dtype"], int(row["dim"])): Tiles(
                *(int(row[name]) for name in Tiles._fields)
            )
            for row in csv.DictReader(file)
        }


def write_table(table: dict[Key, Tiles], path: Path = TABLE_PATH) -> None:
    """Write a table that `read_table` reads, sorted by its keys."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Key._fields + Tiles._fields)
        writer.writerows(key + tile for key, tile in sorted(table.items()))


TABLE = read_table()


def tiles(kernel: str, architecture: int, dim: int, dtype: torch.dtype) -> Tiles:
    """Return the launch parameters of a kernel (`score`, `adversary` or `hardest`) for a dimension of DIMS.

    Architectures without rows in the table use those of sm_90 if they are similar (sm_90, sm_100), and otherwise those
    of sm_80, which also fit the shared memory of smaller GPUs (sm_86, sm_89, sm_120).
    """
    name = str(dtype).removeprefix("torch.")
    similar = 90 if architecture // 10 in (9, 10) else 80
    return TABLE.get(Key(kernel, architecture, name, dim)) or TABLE[Key(kernel, similar, name, dim)]


def products(dtype: torch.dtype, dim: int, sums: bool = True, interpreted: bool = INTERPRETED) -> Products:
    """Choose how to multiply elements of a dtype on tensor cores.

    - bf16: both products are in bf16. This rounds p to 8 bits, as flash attention does.
    - fp16: similarities are in fp16. The adversary's p exceeds fp16's range, so the factors of weighted sums are tf32,
      which has fp16's 11 bits and fp32's range.
    - fp32: each factor is split into two tf32 numbers, and the three largest of their four products are added
      (tf32x3). The error is about 2^-22 |q| |c|, and the speed a sixth of bf16's. In kernels with weighted sums over
      more than 128 dimensions, and in others over more than 256, the split factors would exceed the registers; there
      fp32 is multiplied without tensor cores.

    The interpreter has no bf16 arithmetic and computes in fp32 instead, as it does for all tf32.

    Args:
        dtype: Dtype of the queries.
        dim: Number of dimensions.
        sums: Whether the kernel has weighted sums.
        interpreted: Whether the interpreter runs the kernel.
    """
    import triton.language as tl

    if dtype is torch.bfloat16:
        return Products(tl.float32, tl.float32, "ieee") if interpreted else Products(tl.bfloat16, tl.bfloat16, "tf32")
    if dtype is torch.float16:
        return Products(tl.float16, tl.float32, "tf32")
    return Products(tl.float32, tl.float32, "tf32x3" if dim <= (128 if sums else 256) else "ieee")


def unsupported(q_ND: Tensor) -> str | None:
    """Return why the kernels do not take queries of this dimension, dtype and device; None if they do."""
    if q_ND.shape[-1] not in DIMS:
        return f"got dimension {q_ND.shape[-1]}, the triton kernels need one of {DIMS}"
    if q_ND.dtype not in DTYPES:
        return f"got type {q_ND.dtype}, the triton kernels need one of {DTYPES}"
    if not q_ND.is_cuda and not INTERPRETED:
        return f"got tensors on {q_ND.device}, the triton kernels need a CUDA device"
    if architecture(q_ND.device) < 80:
        return f"got a device of sm_{architecture(q_ND.device)}, the triton kernels need sm_80 or newer"
    return None


def check(name: str, q_ND: Tensor) -> None:
    """Raise ValueError if the kernels do not take these queries."""
    if reason := unsupported(q_ND):
        raise ValueError(f"{name}: {reason}")


def architecture(device: torch.device) -> int:
    """Return the device's compute capability as a number such as 80 for sm_80; 80 for the interpreter on a CPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_splits(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """Return the number of splits of the columns with which row tiles x splits fill the device's processors evenly."""
    processors = _INTERPRETER_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return best_splits(row_tiles, column_tiles, processors)


def best_splits(row_tiles: int, column_tiles: int, processors: int) -> int:
    """Compute `num_splits` for a number of processors.

    The time of a choice is the number of rounds of programs times the tiles of a program. The fewest splits are chosen
    whose time is nearly that of the fastest.
    """
    most = max(_MAX_SPLITS, -(-processors // max(1, row_tiles)))
    times = {
        splits: -(-row_tiles * splits // processors) * -(-column_tiles // splits)
        for splits in range(1, max(1, min(most, column_tiles)) + 1)
    }
    return next(splits for splits, time in times.items() if _GAIN * time <= min(times.values()))
