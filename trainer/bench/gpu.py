"""The Triton kernels on a GPU: errors against fp64, times against other implementations and the roofline, best tiles.

The other implementation is the published formulation (`trainer.bench.kernels`), as written and with torch.compile,
under autocast for half types.

Shapes: N queries and as many keys, K negatives, D dimensions.
"""

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kernels import reference
from kernels.ops import triton_kernels
from kernels.triton import tiles
from trainer.bench import static
from trainer.bench.harness import Columns, environment, measure_gpu, print_rows, write_result
from trainer.bench.kernels import (
    NegativesCase,
    kernel_adversary,
    kernel_score,
    kernel_step,
    materialised_step,
    random_case,
)
from trainer.plan import roofline

_TRITON = triton_kernels()

SHAPES = ((1024, 65536), (4096, 65536), (1024, 2**20), (4096, 2**20))  # N, K
CHECKED = (1000, 65521)  # not multiples of any tile; takes about 3 GiB in fp64

# Largest error, as a share of the largest value.
_SUMS = 1e-4  # sums of exponentials in fp32
_WEIGHTED = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-4}  # by the rounding of weights (bf16, tf32, 2 x tf32)
_ROUNDED = 2e-2  # stored in bf16 by stochastic rounding: neighbours are 1/128 apart

# Candidates for the table of tiles: rows, columns, warps, stages.
CANDIDATES = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))


def device() -> torch.device:
    """Return the GPU. Raises ValueError on a machine without one."""
    if not torch.cuda.is_available():
        raise ValueError("got a machine without a CUDA device, this benchmark needs one (`bench kernels` does not)")
    return torch.device("cuda")


def run(
    device: torch.device,
    dim: int,
    dtypes: tuple[str, ...],
    repeats: int,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    checked: tuple[int, int] = CHECKED,
) -> dict[str, Any]:
    """Check and time the Triton kernels.

    Args:
        device: The GPU.
        dim: Dimensions D.
        dtypes: Types of queries, keys and unit rows, of `static.DTYPES`; ValueError for others.
        repeats: Number of timed calls of each step and kernel.
        shapes: N and K of the timed steps.
        checked: N and K of the comparison with fp64.

    Returns:
        A dictionary with three lists of rows: `checks`, whose errors and tolerances are shares of the largest value;
        `steps`, with seconds None where memory was too small; `kernels`, with share None for an unknown GPU.
    """
    unknown = set(dtypes) - set(static.DTYPES)
    if unknown:
        raise ValueError(f"bench gpu: got dtype {unknown.pop()!r}, need one of {', '.join(static.DTYPES)}")
    checks = [
        row for dtype in dtypes for types in static.WEIGHTS for row in _check(device, *checked, dim, dtype, *types)
    ]
    steps, alone = [], []
    for (n, k), dtype in itertools.product(shapes, dtypes):
        shape = {"N": n, "K": k, "D": dim, "dtype": dtype}
        case = random_case(n, k, dim, torch.float32).map(lambda x: x.to(device))
        steps += [shape | row for row in _time_steps(case, dtype, repeats)]
        alone += [shape | row for row in _time_kernels(case, dtype, repeats)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, **environment(), "checks": checks, "steps": steps, "kernels": alone}


def report(result: dict[str, Any], out: Path | None) -> bool:
    """Print the result of `run` as tables, write it to `out` as JSON, and return whether all checks passed."""
    print_rows(
        f"{result['device']}: errors against fp64",
        {
            "type": lambda row: row["dtype"],
            "weights, velocity": lambda row: f"{row['weights']}, {row['velocity']}",
            "value": lambda row: row["name"],
            "error": lambda row: f"{row['error']:.1e}" + ("" if row["ok"] else " [red]wrong[/red]"),
            "allowed": lambda row: f"{row['tolerance']:.1e}",
        },
        result["checks"],
        text_columns=3,
    )
    shape: Columns = {
        "type": lambda row: row["dtype"],
        "N": lambda row: f"{row['N']:,}",
        "K": lambda row: f"{row['K']:,}",
        "ms": lambda row: "out of memory" if row["seconds"] is None else f"{1e3 * row['seconds']:.3f}",
    }
    step: Columns = {
        "step": lambda row: row["impl"],
        **shape,
        "peak memory": lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        "speed-up": lambda row: "" if row["speedup"] is None else f"{row['speedup']:.1f}x",
    }
    print_rows("One step of the negatives", step, result["steps"], text_columns=2)
    kernel: Columns = {
        "kernel": lambda row: row["kernel"],
        **shape,
        "roofline ms": lambda row: "" if row["share"] is None else f"{1e3 * row['roofline_seconds']:.3f}",
        "limit": lambda row: row["limit"] or "",
        "share": lambda row: "" if row["share"] is None else f"{100 * row['share']:.0f} %",
    }
    print_rows("Each kernel against the roofline", kernel, result["kernels"], text_columns=2)
    write_result(out, result)
    return all(row["ok"] for row in result["checks"])


def tune(device: torch.device, repeats: int, shape: tuple[int, int] = (4096, 65536)) -> list[dict[str, Any]]:
    """Find the fastest tiles of each kernel and write them to `kernels/triton/tiles.csv` for this architecture.

    Of CANDIDATES, those that the compiler fits into registers and shared memory are timed, at N and K of `shape`.
    Returns a dictionary for each kernel, type and dimension.
    """
    architecture = tiles.architecture(device)
    compiled_for = 90 if architecture // 10 in (9, 10) else 80
    found = []
    for dim, dtype, kernel in itertools.product(static.DIMS, static.DTYPES, _CALLS):
        weights, velocity = static.WEIGHTS[0] if kernel == "adversary" else (None, None)
        kept = 16 if kernel == "hardest" else None
        jobs = [static.Job(kernel, compiled_for, dim, dtype, weights, velocity, tile, kept) for tile in CANDIDATES]
        fitting = [
            tiles.Tiles(*tile)
            for tile, row in zip(CANDIDATES, static.run(jobs, os.cpu_count() or 1), strict=True)
            if row["spilled"] == 0 and row["programs"] > 0
        ]
        case = random_case(*shape, dim, torch.float32).map(lambda x: x.to(device)).with_dtype(getattr(torch, dtype))
        key = tiles.Key(kernel, architecture, dtype, dim)
        seconds = {}
        for tile in fitting:
            tiles.TABLE[key] = tile
            seconds[tile] = measure_gpu(functools.partial(_CALLS[kernel], case), repeats)[0]
        best = min(fitting, key=seconds.__getitem__)
        tiles.TABLE[key] = best
        tiles.write_table(
            tiles.TABLE, tiles.TABLE_PATH
        )  # after each kernel, so that an interrupted run keeps its results
        row = {"kernel": kernel, "dtype": dtype, "dim": dim, "tried": len(fitting), "tile": best}
        found.append(row | {"seconds": seconds[best]})
        Console().print(f"{kernel} {dtype} D = {dim}: {best}, {1e3 * seconds[best]:.3f} ms, best of {len(fitting)}")
    return found


def _score(case: NegativesCase) -> object:
    return kernel_score(case, _TRITON)


def _adversary(case: NegativesCase) -> object:
    coef_N = torch.full((len(case.q_ND),), 1e-20, device=case.q_ND.device)
    return kernel_adversary(case, _TRITON, coef_N, lr=0.0)  # repeated calls must not move the bank


def _hardest(case: NegativesCase) -> object:
    return _TRITON.hardest(case.q_ND, case.n_KD, None, 16)


_CALLS: dict[str, Callable[[NegativesCase], object]] = {"score": _score, "adversary": _adversary, "hardest": _hardest}


def _check(
    device: torch.device, n: int, k: int, dim: int, dtype: str, weights: str, velocity: str | None
) -> list[dict[str, Any]]:
    """Compare all results of `score` and `adversary_step` with the specification in fp64 on the same rounded inputs."""
    case = random_case(n, k, dim, torch.float32).map(lambda x: x.to(device)).with_dtype(getattr(torch, dtype))
    case.w_KD = case.w_KD.to(getattr(torch, weights))
    case.v_KD = None if velocity is None else torch.zeros_like(case.w_KD, dtype=getattr(torch, velocity))
    exact = case.map(Tensor.double)
    score, exact_score = kernel_score(case, _TRITON), kernel_score(exact, reference)
    coef_N = 1 / (exact_score.za_N * n)
    stats = kernel_adversary(case, _TRITON, coef_N.float())
    exact_stats = kernel_adversary(exact, reference, coef_N)
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for results, exact_results in ((score, exact_score), (stats, exact_stats)):
        values |= {name: (x, getattr(exact_results, name)) for name, x in results._asdict().items()}
    stored = {"w": weights, "n": dtype} | ({"v": velocity} if velocity else {})
    values |= {name: (getattr(case, f"{name}_KD"), getattr(exact, f"{name}_KD")) for name in stored}
    rows = []
    for name, (got, expected) in values.items():
        tolerance = _SUMS if name in ("z_N", "za_N", "top_N", "mass_K") else _WEIGHTED[dtype]
        if stored.get(name) == "bfloat16" or (name == "n" and weights == "bfloat16"):
            tolerance = _ROUNDED
        error = float((got.double() - expected).abs().max() / expected.abs().max())
        row = {"name": name, "dtype": dtype, "weights": weights, "velocity": velocity, "error": error}
        rows.append(row | {"tolerance": tolerance, "ok": error <= tolerance})  # NaN is not ok
    return rows


def _time_steps(case: NegativesCase, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Time the published step, as written and compiled, and ours, each on its own copy of the bank."""
    compiled = functools.cache(functools.partial(torch.compile, dynamic=False))
    precision = getattr(torch, dtype)

    def published(case: NegativesCase, compile: Callable[..., Any] = lambda f: f) -> None:
        with torch.autocast(case.q_ND.device.type, precision, enabled=precision != torch.float32):
            materialised_step(case, compile)

    steps: dict[str, tuple[Callable[[NegativesCase], object], Callable[[], NegativesCase]]] = {
        "materialised": (published, case.transposed),
        "torch.compile": (functools.partial(published, compile=compiled), case.transposed),
        "triton": (
            functools.partial(kernel_step, implementation=_TRITON),
            lambda: case.map(Tensor.clone).with_dtype(precision),
        ),
    }
    rows: list[dict[str, Any]] = []
    for name, (step, start) in steps.items():
        row: dict[str, Any] = {"impl": name, "seconds": None, "peak_bytes": None, "speedup": None}
        rows.append(row)
        try:
            row["seconds"], row["peak_bytes"] = measure_gpu(functools.partial(step, start()), repeats)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        if row["seconds"] and rows[0]["seconds"]:
            row["speedup"] = rows[0]["seconds"] / row["seconds"]
    return rows


def _time_kernels(case: NegativesCase, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Time `score` and `adversary_step` alone and divide the roofline's time by theirs."""
    case = case.map(Tensor.clone).with_dtype(getattr(torch, dtype))
    gpu = roofline.BY_CAPABILITY.get(tiles.architecture(case.q_ND.device))
    bounds: dict[str, Callable[..., roofline.Roofline]] = {"score": roofline.score, "adversary": roofline.adversary}
    rows = []
    for name, bound in bounds.items():
        seconds, _ = measure_gpu(functools.partial(_CALLS[name], case), repeats)
        row: dict[str, Any] = {"kernel": name, "seconds": seconds}
        row |= {"roofline_seconds": None, "limit": None, "share": None}
        if gpu is not None:
            least = bound(gpu, len(case.q_ND), *case.w_KD.shape, dtype)
            row |= {"roofline_seconds": least.seconds, "limit": least.limit, "share": least.seconds / seconds}
        rows.append(row)
    return rows
