"""Resources of the compiled Triton kernels, without a GPU: registers, spills, shared memory, instructions.

Every kernel is compiled ahead of time and its binary is read with the cuobjdump that comes with Triton. The limits are
those of NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities". A processor here is a streaming multiprocessor.
"""

import csv
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.adversary import adversary_kernel
from kernels.triton.hardest import hardest_kernel
from kernels.triton.score import score_kernel
from kernels.triton.tiles import DIMS, Tiles, products, tiles
from trainer.bench.harness import Columns, print_rows
from trainer.bench.kernels import WEIGHTS

ARCHITECTURES = (80, 90)
DTYPES = ("bfloat16", "float16", "float32")

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may use
SHARED_MEMORY_OF_SMALL = 99 * 1024  # on sm_86, sm_89 and sm_120
_SHARED_MEMORY_OF_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024}
_RESERVED = 1024  # bytes of shared memory that each program takes in addition
_REGISTERS = 65536  # of a processor, allocated 8 at a time to each thread
_WARPS = 64  # of a processor

# Variants of `score` beside AdCo's published one, which has keys, negatives and two temperatures with ratio 6.
VARIANTS: dict[str, dict[str, Any]] = {
    "partly filled tiles": {"RAGGED_KEYS": True, "RAGGED_NEGATIVES": True},
    "one temperature": {"POWER": 1},
    "other temperatures": {"POWER": 0},
    "one matrix": {"POWER": 1, "HAS_NEGATIVES": False},
}

# Columns of the table: the instructions that each counts.
INSTRUCTIONS = {
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "WARPGROUP.ARRIVE": r"WARPGROUP\.ARRIVE",  # one for each product, unless ptxas serialises the instructions
    "MUFU.EX2": r"MUFU\.EX2",
    "LDG.128": r"LDG\..*128",
    "LDG": r"LDG\.(?!.*128)",
    "LDGSTS.128": r"LDGSTS\..*128",
    "LDGSTS": r"LDGSTS\.(?!.*128)",
    "STG": r"STG",
    "LDL and STL": r"LDL|STL",
}


class Job(NamedTuple):
    """One kernel to compile.

    architecture: 80 or 90. weights and velocity: types, for `adversary` only. tile: as `kernels.triton.tiles.Tiles`,
    None for the tile of the table. kept: number of columns kept for each query, for `hardest` only. variant: a key of
    VARIANTS, for `score` only.
    """

    kernel: str
    architecture: int
    dim: int
    dtype: str
    weights: str | None = None
    velocity: str | None = None
    tile: tuple[int, int, int, int] | None = None
    kept: int | None = None
    variant: str | None = None


def jobs() -> list[Job]:
    """Return all combinations of kernel, dimension, type and architecture.

    In bf16, `adversary` also has jobs with low-precision weights. With the dimensions of the recipes too, `score` also
    has its variants, and `hardest`, which keeps 16 columns, also one with 128.
    """
    found = []
    for architecture, dim, dtype in product(ARCHITECTURES, DIMS, DTYPES):
        common, bf16 = (architecture, dim, dtype), dtype == "bfloat16"
        recipe = bf16 and dim in (128, 256)
        found += [Job("score", *common, variant=variant) for variant in (None, *(VARIANTS if recipe else ()))]
        found += [Job("adversary", *common, *types) for types in (WEIGHTS if bf16 else WEIGHTS[:1])]
        found += [Job("hardest", *common, kept=kept) for kept in ((16, 128) if recipe else (16,))]
    return found


def run(jobs: list[Job], processes: int = 2) -> list[dict[str, Any]]:
    """Compile the jobs in separate processes.

    Returns:
        One dictionary for each job: its fields and those of its tile; registers and spilled bytes of a thread; shared
        bytes of a program; programs and warps that fit on a processor at a time, and their share of the largest
        possible number (occupancy); the number of each of INSTRUCTIONS and of all; the versions of torch and triton.
    """
    os.environ["TRITON_INTERPRET"] = "0"  # inherited by the processes; the compiler does not run where it is 1
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_job, jobs))


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the rows of `run` as a table for each architecture and write them to `out` as CSV."""
    counted = list(INSTRUCTIONS)[:-1]  # `LDL and STL` are the spills, which have a column
    for architecture in sorted({row["architecture"] for row in rows}):
        columns: Columns = {
            "kernel": _label,
            "D": lambda row: str(row["dim"]),
            "tile": lambda row: f"{row['rows']}x{row['columns']} {row['warps']}w {row['stages']}s",
            "registers": lambda row: str(row["registers"]),
            "spilled": lambda row: str(row["spilled"]),
            "shared": lambda row: f"{row['shared'] / 1024:.0f} KiB",
            "programs": lambda row: str(row["programs"]),
            "occupancy": lambda row: f"{row['warps_per_processor']} ({100 * row['occupancy']:.0f} %)",
            **{name: lambda row, name=name: str(row[name]) for name in counted},  # type: ignore[misc]
        }
        print_rows(f"sm_{architecture}", columns, [row for row in rows if row["architecture"] == architecture])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _label(row: dict[str, Any]) -> str:
    types = f" W {row['weights']}, v {row['velocity']}" if row["weights"] else ""
    kept = f" {row['kept']} kept" if row["kept"] else ""
    return f"{row['kernel']} {row['dtype']}{types}".replace("float", "") + kept + (f" {row['variant'] or ''}").rstrip()


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one job in this process and return its row of `run`.

    The kernel is specialised as in training: published temperatures, own keys, sizes and addresses that are multiples
    of 16 and of the tiles, unless its variant says otherwise.
    """
    tile = Tiles(*job.tile) if job.tile else tiles(job.kernel, job.architecture, job.dim, getattr(torch, job.dtype))
    kernel, signature, constants = _arguments(job, tile)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("num_")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", job.architecture, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    resources, opcodes = _read(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    programs = _programs(job.architecture, tile.warps, resources["REG"], shared)
    fields = job._asdict()
    del fields["tile"]
    return {
        **fields,
        **tile._asdict(),
        "registers": resources["REG"],
        "spilled": resources["STACK"],
        "shared": shared,
        "programs": programs,
        "warps_per_processor": programs * tile.warps,
        "occupancy": programs * tile.warps / _WARPS,
        **{name: _count(opcodes, pattern) for name, pattern in INSTRUCTIONS.items()},
        "instructions": opcodes.total(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _arguments(job: Job, tile: Tiles) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Return the kernel, the signature of its arguments and the values of the compile-time constants."""
    kernel = {"score": score_kernel, "adversary": adversary_kernel, "hardest": hardest_kernel}[job.kernel]
    similarity, weighted, precision = products(
        getattr(torch, job.dtype), job.dim, sums=job.kernel != "hardest", interpreted=False
    )
    values: dict[str, Any] = {"D": job.dim, "B": tile.rows, "T": tile.columns, "P": job.kept}
    values |= {"SIMILARITY": similarity, "WEIGHTED": weighted, "PRECISION": precision}
    values |= {"HAS_KEYS": True, "HAS_OWN": True, "HAS_NEGATIVES": True, "POWER": 6}
    values |= {"RAGGED_KEYS": False, "RAGGED_NEGATIVES": False, **VARIANTS.get(job.variant or "", {})}
    types = dict.fromkeys(("q_ptr", "k_ptr", "n_ptr", "c_ptr"), job.dtype)
    types |= {"own_ptr": "int64", "kept_ptr": "int64", "w_ptr": job.weights or "float32", "skip_ptr": "uint8"}
    types |= {"lr_ptr": "float64", "seed_ptr": "int64"}
    if job.velocity is None:
        values["v_ptr"] = None
    else:
        types["v_ptr"] = job.velocity
    constants = {name: values[name] for name in kernel.arg_names if name in values}
    signature = {
        name: "constexpr" if name in constants else _triton_type(name, types.get(name, "float32"))
        for name in kernel.arg_names
    }
    return kernel, signature, constants


def _triton_type(argument: str, dtype: str) -> str:
    """Return Triton's type of an argument: a pointer to elements of `dtype`, an integer or a float."""
    if argument.endswith("_ptr"):
        floats = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
        return "*" + {**floats, "int64": "i64", "uint8": "u8"}[dtype]
    return "i32" if argument.startswith("num_") or argument in ("tiles_per_split", "first") else "fp32"


def _read(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    """Return the resources under cuobjdump's names (REG, STACK, …) and the number of instructions of each opcode."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    resources = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    return resources, Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)", sass))


def _count(opcodes: Counter[str], pattern: str) -> int:
    return sum(count for opcode, count in opcodes.items() if re.match(rf"(?:{pattern})", opcode))


def _programs(architecture: int, warps: int, registers: int, shared: int) -> int:
    """Return how many programs fit on a processor at a time; 0 if one needs more shared memory than there is."""
    if shared > SHARED_MEMORY[architecture]:
        return 0
    by_registers = _REGISTERS // (warps * 32 * (-(-registers // 8) * 8))
    by_memory = _SHARED_MEMORY_OF_PROCESSOR[architecture] // (shared + _RESERVED)
    return min(by_registers, by_memory, _WARPS // warps, 32)
