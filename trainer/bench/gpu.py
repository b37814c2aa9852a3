"""The Triton kernels on a GPU: right, how fast, how far from the roofline; and which tiles are fastest.

Compared with the formulation that stores N x K tensors (`trainer.bench.kernels`), as it is and by torch.compile, under
autocast for half types. Times are medians by CUDA events, with the caches emptied before each call.

N queries and as many keys, K negatives, D dimensions.
"""

import functools
import itertools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernels
from kernels import reference
from trainer.bench import static
from trainer.bench.kernels import (
    ADVERSARY_TEMPERATURE,
    MOMENTUM,
    TEMPERATURE,
    WEIGHT_DECAY,
    Game,
    materialised,
    ours,
    random_game,
)
from trainer.plan import roofline

SHAPES = ((1024, 65536), (4096, 65536), (1024, 2**20), (4096, 2**20))  # N, K
CHECKED = (1000, 65521)  # not multiples of any tile; in fp64 about 3 GiB

# Largest error, as a share of the largest value. Sums of exponentials and what is no sum: those of fp32. Weighted sums:
# the weights' rounding to bf16 (8 bits), tf32 (11) or two tf32 numbers. Stored rows: the rounding of their type.
_SUMS = 1e-4
_ROUNDED = 2e-2  # at random to one of two neighbours in bf16, a 128th apart, and what that changes in the step
_WEIGHTED = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-4}

# Candidates for the table of tiles: rows, columns, warps, stages.
CANDIDATES = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))


def device() -> torch.device:
    """The GPU, or ValueError where there is none."""
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
    """Errors against fp64 at the shape `checked`; times of the steps and of each kernel at all shapes.

    Keys: device, torch; checks: name, dtype, weights, velocity, error and tolerance (shares of the largest value), ok;
    steps: N, K, D, dtype, impl, seconds, peak_bytes (None where memory was too small), speedup over `materialised`;
    kernels: N, K, D, dtype, kernel, seconds, and, for a GPU of `roofline.GPUS`, roofline_seconds, limit, share.
    """
    unknown = set(dtypes) - set(static.DTYPES)
    if unknown:
        raise ValueError(f"bench gpu: got dtype {unknown.pop()!r}, need one of {', '.join(static.DTYPES)}")
    result: dict[str, Any] = {"device": _name(device), "torch": torch.__version__}
    result["checks"] = [
        row for dtype in dtypes for forms in static.WEIGHTS for row in _check(device, *checked, dim, dtype, *forms)
    ]
    result["steps"], result["kernels"] = [], []
    for (n, k), dtype in itertools.product(shapes, dtypes):
        shape = {"N": n, "K": k, "D": dim, "dtype": dtype}
        game = _on(random_game(n, k, dim, torch.float32), device)
        result["steps"] += [shape | row for row in _time_steps(game, dtype, repeats)]
        result["kernels"] += [shape | row for row in _time_kernels(game, dtype, repeats)]
    return result


def report(result: dict[str, Any], out: Path | None) -> bool:
    """Print the result of `run`, write it to `out` as JSON; whether all checks passed."""
    table = Table("type", "weights, velocity", "value", "error", "allowed", title=f"{result['device']}: against fp64")
    for row in result["checks"]:
        mark = "" if row["ok"] else " [red]wrong[/red]"
        form = f"{row['weights']}, {row['velocity']}"
        table.add_row(row["dtype"], form, row["name"], f"{row['error']:.1e}{mark}", f"{row['tolerance']:.1e}")
    steps = Table("N", "K", "type", "step", "ms", "peak memory", "speed-up", title="The negatives' step")
    for row in result["steps"]:
        found = ("out of memory", "", "")
        if row["seconds"] is not None:
            speedup = "" if row["speedup"] is None else f"{row['speedup']:.1f}x"
            found = (f"{1e3 * row['seconds']:.3f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB", speedup)
        steps.add_row(f"{row['N']:,}", f"{row['K']:,}", row["dtype"], row["impl"], *found)
    alone = Table("N", "K", "type", "kernel", "ms", "at best", "binds", "share", title="Against the roofline")
    for row in result["kernels"]:
        best = ("", "", "")
        if row["roofline_seconds"] is not None:
            best = (f"{1e3 * row['roofline_seconds']:.3f}", row["limit"], f"{100 * row['share']:.0f} %")
        alone.add_row(
            f"{row['N']:,}", f"{row['K']:,}", row["dtype"], row["kernel"], f"{1e3 * row['seconds']:.3f}", *best
        )
    for each in (table, steps, alone):
        Console().print(each)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return all(row["ok"] for row in result["checks"])


def tune(device: torch.device, repeats: int, shape: tuple[int, int] = (4096, 65536)) -> list[dict[str, Any]]:
    """The fastest tiles of each kernel on this device, written to `kernels/triton/tiles.csv` for its architecture.

    Of CANDIDATES those are timed that the compiler fits into registers and shared memory. One dictionary for each
    kernel, type and dimension: kernel, dtype, dim, tried, tile, seconds.
    """
    from kernels.triton.tiles import TABLE, TABLE_PATH, Key, Tiles, architecture, write_table

    number = architecture(device)
    compiled_for = 90 if number // 10 in (9, 10) else 80
    found = []
    for dim, dtype, kernel in itertools.product(static.DIMS, static.DTYPES, _CALLS):
        weights, velocity = static.WEIGHTS[0] if kernel == "adversary" else (None, None)
        kept = 16 if kernel == "hardest" else None
        jobs = [static.Job(kernel, compiled_for, dim, dtype, weights, velocity, tile, kept) for tile in CANDIDATES]
        fitting = [
            Tiles(*job.tile)
            for job, row in zip(jobs, static.run(jobs, os.cpu_count() or 1), strict=True)
            if row["spilled"] == 0 and row["programs"] > 0 and job.tile is not None
        ]
        game = _narrow(_on(random_game(*shape, dim, torch.float32), device), dtype)
        key = Key(kernel, number, dtype, dim)
        seconds = {}
        for tile in fitting:
            TABLE[key] = tile
            seconds[tile] = measure(functools.partial(_CALLS[kernel], game), device, repeats)[0]
        best = min(fitting, key=seconds.__getitem__)
        TABLE[key] = best
        write_table(TABLE, TABLE_PATH)  # at once: what is found stays, should the rest be cut off
        row = {"kernel": kernel, "dtype": dtype, "dim": dim, "tried": len(fitting), "tile": best}
        found.append(row | {"seconds": seconds[best]})
        Console().print(f"{kernel} {dtype} D = {dim}: {best}, {1e3 * seconds[best]:.3f} ms, best of {len(fitting)}")
    return found


def measure(action: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, int]:
    """Median seconds of `repeats` calls by the device's clock, and the most bytes a call held beyond what was held."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)  # larger than any second-level cache
    action()  # compiles
    action()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - held


def _score(game: Game) -> kernels.Score:
    own_N = torch.arange(len(game.q_ND), device=game.q_ND.device)
    return kernels.score(game.q_ND, game.k_ND, own_N, game.n_KD, TEMPERATURE, ADVERSARY_TEMPERATURE, kernels="triton")


def _adversary(game: Game, lr: float = 0.0) -> kernels.AdversaryStats:
    coef_N = torch.full((len(game.q_ND),), 1e-20, device=game.q_ND.device)
    return _step(game, coef_N, lr, "triton")


def _hardest(game: Game) -> kernels.Hardest:
    return kernels.hardest(game.q_ND, game.n_KD, None, 16, kernels="triton")


_CALLS: dict[str, Callable[[Game], object]] = {"score": _score, "adversary": _adversary, "hardest": _hardest}


def _step(game: Game, coef_N: Tensor, lr: float, implementation: str, v: bool = True) -> kernels.AdversaryStats:
    return kernels.adversary_step(
        game.q_ND,
        coef_N,
        game.n_KD,
        game.w_KD,
        game.v_KD if v else None,
        temperature=ADVERSARY_TEMPERATURE,
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        kernels=implementation,
    )


def _check(
    device: torch.device, n: int, k: int, dim: int, dtype: str, weights: str, velocity: str | None
) -> list[dict[str, Any]]:
    """Every result of `score` and `adversary_step` against the specification in fp64 on the same rounded inputs."""
    game = _narrow(_on(random_game(n, k, dim, torch.float32), device), dtype)
    game.w_KD, game.v_KD = (
        x.to(getattr(torch, t or "float32")) for x, t in ((game.w_KD, weights), (game.v_KD, velocity))
    )
    exact = Game(*(x.double() for x in vars(game).values()))
    own_N = torch.arange(n, device=device)
    truth = reference.score(exact.q_ND, exact.k_ND, own_N, exact.n_KD, TEMPERATURE, ADVERSARY_TEMPERATURE)
    values = {name: (x, truth._asdict()[name]) for name, x in _score(game)._asdict().items()}
    coef_N = 1 / (truth.za_N * n)
    stats = _step(game, coef_N.float(), 3.0, "triton", velocity is not None)
    exact_stats = _step(exact, coef_N, 3.0, "reference", velocity is not None)
    values |= {name: (x, exact_stats._asdict()[name]) for name, x in stats._asdict().items()}
    stored = {"w": weights, "n": dtype} | ({"v": velocity} if velocity else {})
    values |= {name: (getattr(game, f"{name}_KD"), getattr(exact, f"{name}_KD")) for name in stored}
    rows = []
    for name, (got, expected) in values.items():
        tolerance = _SUMS if name in ("z_N", "za_N", "top_N", "mass_K") else _WEIGHTED[dtype]
        if stored.get(name) == "bfloat16" or (name == "n" and weights == "bfloat16"):
            tolerance = _ROUNDED
        error = float((got.double() - expected).abs().max() / expected.abs().max())
        row = {"name": name, "dtype": dtype, "weights": weights, "velocity": velocity, "error": error}
        rows.append(row | {"tolerance": tolerance, "ok": error <= tolerance})  # NaN is wrong, too
    return rows


def _time_steps(game: Game, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Our step and the materialised one, each from its own copy of the bank."""
    compiled = functools.cache(functools.partial(torch.compile, dynamic=False))
    precision = getattr(torch, dtype)

    def published(state: Game, optimised: Callable[..., Any] = lambda f: f) -> None:
        with torch.autocast(state.q_ND.device.type, precision, enabled=precision != torch.float32):
            materialised(state, optimised)

    steps: dict[str, tuple[Callable[[Game], object], Callable[[], Game]]] = {
        "materialised": (published, game.transposed),
        "torch.compile": (functools.partial(published, optimised=compiled), game.transposed),
        "triton": (functools.partial(ours, implementation="triton"), lambda: _narrow(game.copy(), dtype)),
    }
    rows: list[dict[str, Any]] = []
    for name, (step, start) in steps.items():
        try:
            seconds, peak = measure(functools.partial(step, start()), game.q_ND.device, repeats)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append({"impl": name, "seconds": None, "peak_bytes": None, "speedup": None})
            continue
        plain = seconds if name == "materialised" else rows[0]["seconds"]
        speedup = None if plain is None else plain / seconds
        rows.append({"impl": name, "seconds": seconds, "peak_bytes": peak, "speedup": speedup})
    return rows


def _time_kernels(game: Game, dtype: str, repeats: int) -> list[dict[str, Any]]:
    narrow = _narrow(game.copy(), dtype)
    shape = (len(game.q_ND), *game.w_KD.shape)
    gpu = roofline.GPUS.get(_capability(game.q_ND.device))
    rows = []
    least_of: dict[str, Callable[..., roofline.Roofline]] = {"score": roofline.score, "adversary": roofline.adversary}
    for name, best in least_of.items():
        seconds, _ = measure(functools.partial(_CALLS[name], narrow), game.q_ND.device, repeats)
        row: dict[str, Any] = {"kernel": name, "seconds": seconds}
        row |= {"roofline_seconds": None, "limit": None, "share": None}
        if gpu is not None:
            least = best(gpu, *shape, dtype)
            row |= {"roofline_seconds": least.seconds, "limit": least.limit, "share": least.seconds / seconds}
        rows.append(row)
    return rows


def _narrow(game: Game, dtype: str) -> Game:
    """With queries, keys and unit rows of this type."""
    q_ND, k_ND, n_KD = (x.to(getattr(torch, dtype)) for x in (game.q_ND, game.k_ND, game.n_KD))
    return Game(q_ND, k_ND, game.w_KD, game.v_KD, n_KD)


def _on(game: Game, device: torch.device) -> Game:
    return Game(*(x.to(device) for x in vars(game).values()))


def _capability(device: torch.device) -> int:
    from kernels.triton.tiles import architecture

    return architecture(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
