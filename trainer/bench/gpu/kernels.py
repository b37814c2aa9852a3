"""The Triton kernels on a GPU: errors against fp64, repeatability, times against the roofline, and the best tiles.

On a CPU the checks run the operators' implementation there (`kernels.chunked`), or the Triton kernels if
TRITON_INTERPRET=1 is set. The other implementation of the timings is the published formulation
(`trainer.bench.kernels`), as written and with torch.compile, under autocast for half types.

Shapes: N queries and as many keys, K negatives, D dimensions.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kernels import chunked, reference
from kernels.ops import Implementation, triton_kernels
from kernels.triton import tiles
from trainer.bench.gpu.record import Line, Setting, at_most, fast_enough, holds, skipped
from trainer.bench.harness import measure_gpu, seconds
from trainer.bench.kernels import (
    WEIGHTS,
    NegativesCase,
    kernel_adversary,
    kernel_score,
    kernel_step,
    materialised_step,
    random_case,
)
from trainer.plan import roofline
from trainer.plan.hardware import Gpu, known_gpu

# N and K that are smaller than a tile, one more than a tile, and not multiples of any; the last takes 3 GiB in fp64.
EDGES = ((1, 1), (3, 130), (129, 1000), (1000, 65521))
SHAPES = ((256, 65536), (1024, 65536), (4096, 2**20))  # N, K
DTYPES = ("bfloat16", "float16", "float32")

# Largest error, as a share of the largest value.
_SUMS = 1e-4  # sums of exponentials in fp32
_WEIGHTED = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-4}  # by the rounding of weights (bf16, tf32, 2 x tf32)
_ROUNDED = 2e-2  # stored in bf16 by stochastic rounding: neighbours are 1/128 apart
_SHARE = (
    0.4  # of the roofline is fast enough: flash attention reaches 0.5 to 0.7 on the same products (arXiv 2307.08691)
)

# Candidates for the table of tiles: rows, columns, warps, stages.
CANDIDATES = list(itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))


def require_gpu() -> torch.device:
    """Return the GPU. Raises ValueError on a machine without one."""
    if not torch.cuda.is_available():
        raise ValueError("got a machine without a CUDA device, this benchmark needs one (`bench kernels` does not)")
    return torch.device("cuda")


def implementation(device: torch.device) -> Implementation:
    """Return what the operators run on the device."""
    if device.type == "cuda" or tiles.INTERPRETED:
        return triton_kernels()
    return Implementation(chunked.score, chunked.adversary_step, chunked.hardest)


def check(setting: Setting) -> Iterator[Line]:
    """Compare the kernels with fp64 for all D and types at edge shapes, and with themselves when repeated."""
    dims = (32, 512) if setting.small else tiles.DIMS
    dtypes = DTYPES[2:] if setting.small else DTYPES
    shapes = EDGES[:2] if setting.small else EDGES
    for dtype, dim in itertools.product(dtypes, dims):
        for number, types in enumerate(WEIGHTS):
            if number and dim != 128 and not setting.small:  # the types of the bank are checked at one D
                continue
            for n, k in shapes:
                if (n, k) == EDGES[-1] and (dim != 128 or number):
                    continue
                yield check_case(setting.device, n, k, dim, dtype, *types)


def check_case(device: torch.device, n: int, k: int, dim: int, dtype: str, weights: str, velocity: str | None) -> Line:
    """Compare all results of the three kernels with the specification in fp64 on the same rounded inputs.

    Args:
        device: Where the kernels run.
        n: Number of queries N.
        k: Number of negatives K.
        dim: Dimensions D.
        dtype: Type of queries, keys and unit rows.
        weights: Type of the bank's weights.
        velocity: Type of its velocity; None for none.

    Returns:
        The error that is nearest to its tolerance; failed as well if a repeated call gives other bits.
    """
    kernels = implementation(device)
    case = random_case(n, k, dim, torch.float32).map(lambda x: x.to(device)).with_dtype(getattr(torch, dtype))
    case.w_KD = case.w_KD.to(getattr(torch, weights))
    case.v_KD = None if velocity is None else torch.zeros_like(case.w_KD, dtype=getattr(torch, velocity))
    exact, again = case.map(Tensor.double), case.map(Tensor.clone)
    exact_score = kernel_score(exact, reference)
    coef_N = 1 / (exact_score.za_N * n)
    exact_stats = kernel_adversary(exact, reference, coef_N)
    results = []
    for repetition in (case, again):
        score = kernel_score(repetition, kernels)
        stats = kernel_adversary(repetition, kernels, coef_N.float())
        similarity_NM, _ = kernels.hardest(case.q_ND, case.k_ND, None, min(n, 16))
        bank = {name: getattr(repetition, f"{name}_KD") for name in ("w", "n", *("v" if velocity else ""))}
        results.append({**score._asdict(), **stats._asdict(), **bank, "hardest": similarity_NM})
    expected = {**exact_score._asdict(), **exact_stats._asdict()}
    expected |= {name: getattr(exact, f"{name}_KD") for name in ("w", "n", "v")}
    expected["hardest"] = reference.hardest(exact.q_ND, case.k_ND.double(), None, min(n, 16))[0]
    stored = {"w": weights, "n": dtype} | ({"v": velocity} if velocity else {})
    errors = {}
    for name, value in results[0].items():
        tolerance = _SUMS if name in ("z_N", "za_N", "top_N", "mass_K") else _WEIGHTED[dtype]
        if stored.get(name) == "bfloat16" or (name == "n" and weights == "bfloat16"):
            tolerance = _ROUNDED
        errors[name] = (_error(value, expected[name]), tolerance)
    changed = [name for name, value in results[0].items() if not torch.equal(value, results[1][name])]
    title = f"{dtype}, N {n}, K {k}, D {dim}, W {weights}, V {velocity or 'none'}"
    details: dict[str, object] = {name: error for name, (error, _) in errors.items()}
    if changed:
        return holds(title, False, f"repeated with other bits: {', '.join(changed)}", details)
    wrong = [name for name, (error, tolerance) in errors.items() if not error <= tolerance]  # NaN is wrong, too
    worst = wrong[0] if wrong else max(errors, key=lambda name: errors[name][0] / errors[name][1])
    return at_most(title, *errors[worst], f"of the largest value in fp64: {worst}; same bits twice", "", details)


def _error(value: Tensor, exact: Tensor) -> float:
    """Return the largest error as a share of the largest value. Both are -inf where there is nothing to compare."""
    if torch.equal(value.double(), exact):
        return 0.0
    return float((value.double() - exact).abs().max() / exact.abs().max())


def check_speed(setting: Setting) -> Iterator[Line]:
    """Compare the kernels' times with the roofline, and a whole step with the published formulation's."""
    dtypes = ("bfloat16",) if not setting.small else ("float32",)
    for (n, k), dtype in itertools.product(SHAPES if not setting.small else ((8, 256),), dtypes):
        case = random_case(n, k, 128, torch.float32).map(lambda x: x.to(setting.device))
        title = f"N {n}, K {k}, {dtype}"
        yield from _time_kernels(title, case, dtype, known_gpu(setting.device))
        yield from _time_steps(title, case, dtype)


def _measure(action: Callable[[], object], device: torch.device, repeats: int = 20) -> tuple[float, int]:
    """Return the median seconds of a call and the bytes that it allocates; on a CPU the seconds of one call."""
    return measure_gpu(action, repeats) if device.type == "cuda" else (seconds(action, device), 0)


def tune(device: torch.device, repeats: int, shape: tuple[int, int] = (4096, 65536)) -> list[dict[str, Any]]:
    """Find the fastest tiles of each kernel and write them to `kernels/triton/tiles.csv` for this architecture.

    The table's own tile and those of CANDIDATES that the compiler fits into registers are timed, at N and K of `shape`,
    if they fit into this GPU's shared memory. If none does, the table keeps its tile.
    Returns a dictionary for each kernel, type and dimension.
    """
    from trainer.bench import static  # needs Triton, which a CPU build of torch lacks

    architecture = tiles.architecture(device)
    compiled_for = 90 if architecture // 10 in (9, 10) else 80
    found = []
    for dim, dtype, kernel in itertools.product(static.DIMS, static.DTYPES, _CALLS):
        weights, velocity = WEIGHTS[0] if kernel == "adversary" else (None, None)
        kept = 16 if kernel == "hardest" else None
        shipped = tiles.tiles(kernel, architecture, dim, getattr(torch, dtype))
        candidates = list(dict.fromkeys([shipped, *itertools.starmap(tiles.Tiles, CANDIDATES)]))
        jobs = [static.Job(kernel, compiled_for, dim, dtype, weights, velocity, tile, kept) for tile in candidates]
        fitting = [
            tile
            for tile, row in zip(candidates, static.run(jobs, os.cpu_count() or 1), strict=True)
            if row["shared"] <= _shared_memory(device)
            and (tile == shipped or (row["spilled"] == 0 and row["programs"] > 0))
        ]
        row = {"kernel": kernel, "dtype": dtype, "dim": dim, "tried": len(fitting)}
        if not fitting:
            Console().print(f"{kernel} {dtype} D = {dim}: no tile fits, the table keeps {shipped}")
            found.append(row | {"tile": shipped, "seconds": None})
            continue
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
        found.append(row | {"tile": best, "seconds": seconds[best]})
        Console().print(f"{kernel} {dtype} D = {dim}: {best}, {1e3 * seconds[best]:.3f} ms, best of {len(fitting)}")
    return found


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can use on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # not in torch's stubs


def _score(case: NegativesCase) -> object:
    return kernel_score(case, implementation(case.q_ND.device))


def _adversary(case: NegativesCase) -> object:
    coef_N = torch.full((len(case.q_ND),), 1e-20, device=case.q_ND.device)
    # The rate of zero keeps the bank where it is when the call is repeated.
    return kernel_adversary(case, implementation(case.q_ND.device), coef_N, lr=0.0)


def _hardest(case: NegativesCase) -> object:
    return implementation(case.q_ND.device).hardest(case.q_ND, case.n_KD, None, 16)


_CALLS: dict[str, Callable[[NegativesCase], object]] = {"score": _score, "adversary": _adversary, "hardest": _hardest}


def _time_steps(title: str, case: NegativesCase, dtype: str) -> Iterator[Line]:
    """Time the published step, as written and compiled, and ours, each on its own copy of the bank."""
    device, precision = case.q_ND.device, getattr(torch, dtype)
    compiler = functools.partial(torch.compile, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")

    def published(case: NegativesCase, compile: Callable[..., Any] = lambda f: f) -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            materialised_step(case, compile)

    steps: dict[str, tuple[Callable[[NegativesCase], object], Callable[[], NegativesCase]]] = {
        "published": (published, case.transposed),
        "compiled": (functools.partial(published, compile=functools.cache(compiler)), case.transposed),
        "ours": (
            functools.partial(kernel_step, implementation=implementation(device)),
            lambda: case.map(Tensor.clone).with_dtype(precision),
        ),
    }
    found: dict[str, tuple[float, int]] = {}
    for name, (step, start) in steps.items():
        try:
            found[name] = _measure(functools.partial(step, start()), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    details: dict[str, object] = {name: {"seconds": x[0], "bytes": x[1]} for name, x in found.items()}
    if "ours" not in found:
        yield holds(f"step, {title}", False, "out of memory")
        return
    for name in ("published", "compiled"):
        if name in found:
            ratio = found[name][0] / found["ours"][0]
            yield fast_enough(f"step, {title}", ratio, 1, f"times as fast as {name}", "x", details)
        else:
            yield skipped(f"step, {title}", f"{name}: out of memory", 1e3 * found["ours"][0], "ms")


def _time_kernels(title: str, case: NegativesCase, dtype: str, gpu: Gpu | None) -> Iterator[Line]:
    """Time `score` and `adversary_step` alone and divide the roofline's time by theirs."""
    case = case.map(Tensor.clone).with_dtype(getattr(torch, dtype))
    bounds: dict[str, Callable[..., roofline.Roofline]] = {"score": roofline.score, "adversary": roofline.adversary}
    for name, bound in bounds.items():
        taken, _ = _measure(functools.partial(_CALLS[name], case), case.q_ND.device)
        if gpu is None:
            yield skipped(f"{name}, {title}", "no rates of this device to compare with", 1e3 * taken, "ms")
            continue
        least = bound(gpu, len(case.q_ND), *case.w_KD.shape, dtype)
        note = f"of the roofline, {1e3 * least.seconds:.3f} ms ({least.limit}); {1e3 * taken:.3f} ms"
        yield fast_enough(f"{name}, {title}", 100 * least.seconds / taken, 100 * _SHARE, note, "%")
