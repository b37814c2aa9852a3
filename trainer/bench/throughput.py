"""Training throughput of a configuration on one machine or many, and the time of each phase of a step.

Three modes: `full` trains as `pretrain` does, with the loader; `synthetic` takes the same steps on one random batch
that is already on the device, so the difference is the cost of the loader; `data` runs the loader alone.

Images/s are those of all timed steps together, not of the median step: worker processes deliver their batches at about
the same time, so a few steps contain all waiting for data.
"""

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from data.batch import Batch
from data.loader import train_batches
from data.settings import DataSettings
from data.sources.base import Source
from trainer import distributed
from trainer.bench.harness import environment, print_table, synchronize, write_result
from trainer.bench.synthetic import build_step, frozen_rates, random_batch, warm_up_steps
from trainer.build import autocast_dtype
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.loop import device_name
from trainer.plan.flops import step_flops
from trainer.plan.hardware import peak_flops
from trainer.run.files import read_json
from trainer.run.metrics import peak_memory, set_up_logging
from trainer.run.phases import PhaseTimer, find_straggler, gather_phase_times, host_names, phase_metrics
from trainer.run.sources import open_training
from trainer.train_step import TrainStep

log = logging.getLogger(__name__)

Mode = Literal["full", "synthetic", "data"]
MODES: tuple[Mode, ...] = ("full", "synthetic", "data")
TRACED_STEPS = 3  # after the timed ones, for the time of collectives


def run(config: Config, modes: Sequence[Mode], steps: int, warmup: int) -> dict[str, Any]:
    """Measure the throughput in one mode after the other. Called by all ranks.

    Args:
        config: The configuration.
        modes: The modes to measure.
        steps: Minimum number of timed steps, see `_loader_steps`.
        warmup: Minimum number of steps before them, see `_loader_steps` and `warm_up_steps`.

    Returns:
        What was run, with the numbers of steps taken, and, under `modes`, the figures of each mode; the same on all
        ranks.
    """
    with distributed.process_group(config.run.device) as rank_info, tempfile.TemporaryDirectory() as folder:
        set_up_logging(rank_info.rank)
        device = rank_info.device
        source = None if set(modes) == {"synthetic"} else _open_source(config, folder)
        train_step = None if set(modes) == {"data"} else build_step(config, rank_info)
        if train_step:
            warmup = warm_up_steps(train_step, warmup)
        if source is not None:
            steps, warmup = _loader_steps(config.data, device, steps, warmup)
        figures = {
            mode: _measure(config, rank_info, mode, None if mode == "data" else train_step, source, steps, warmup)
            for mode in modes
        }
        return {
            "backbone": config.model.backbone,
            "method": config.method.name,
            "batch_size": config.data.batch_size,
            "views": [view.size for view in config.data.views],
            "negatives": config.bank.size,
            "placement": config.bank.placement,
            "engine": config.engine.kind,
            "precision": str(autocast_dtype(config, device)).removeprefix("torch."),
            "data": f"{config.data.backend_for(device)}, {config.data.workers_for(device)} workers a rank",
            "ranks": rank_info.world_size,
            "nodes": len(set(host_names())),
            "device": device_name(device),
            "steps": steps,
            "warmup": warmup,
            "modes": figures,
            **environment(),
        }


def _open_source(config: Config, folder: str) -> Source:
    """Open the training images; a listing of files is shared in rank 0's temporary folder where that is visible."""
    folders: list[Any] = [folder]
    dist.broadcast_object_list(folders)
    return open_training(config, Path(folders[0] if os.path.isdir(folders[0]) else folder))


def _loader_steps(settings: DataSettings, device: torch.device, steps: int, warmup: int) -> tuple[int, int]:
    """Return the numbers of timed steps and of warm-up steps with the loader. Called by all ranks.

    Timed are whole rounds of the workers: each worker delivers a batch in a round, and the wait for the round is in one
    step. The warm-up takes all batches that the loader can make ahead: `prefetch` of each worker, and DALI's own.
    """
    workers = torch.tensor(settings.workers_for(device))
    dist.all_reduce(workers, dist.ReduceOp.MAX)  # machines may have different numbers of cores
    count = max(1, int(workers))
    return -(-steps // count) * count, max(warmup, (count + 1) * settings.prefetch)


def _measure(
    config: Config,
    rank_info: RankInfo,
    mode: Mode,
    train_step: TrainStep | None,
    source: Source | None,
    steps: int,
    warmup: int,
) -> dict[str, Any]:
    """Return the figures of one mode; without a training step, batches are only made and normalised."""
    device, batch_size = rank_info.device, config.data.batch_size
    phases = train_step.phases if train_step else PhaseTimer(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the peak of an earlier mode does not count
    if mode == "synthetic":
        batches: Iterator[Batch] = repeat(random_batch(config, rank_info))
    else:
        assert source is not None
        stop, rank, world_size = warmup + steps + TRACED_STEPS, rank_info.rank, rank_info.world_size
        batches = train_batches(source, config.data, config.run.seed, rank, world_size, 0, stop, device)

    def step(number: int) -> None:
        with phases("data"):
            batch = next(batches)
        with phases("normalize"):
            views = batch.to(device) if train_step else batch.normalized(device)
        if train_step:
            train_step.step(views, number, frozen_rates(config))

    for number in range(warmup):
        step(number)
    synchronize(device)
    phases.pop()
    dist.barrier()
    seconds, watts = [], []
    for number in range(warmup, warmup + steps):
        began = time.perf_counter()
        step(number)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        if number % 10 == 0:
            watts += _power(device)
    phase_times = gather_phase_times(phases.pop(), steps)
    late = find_straggler(phase_times, host_names())
    if rank_info.rank == 0 and late:
        log.warning("%s", late)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    step_seconds = _mean(statistics.mean(seconds))
    figures: dict[str, Any] = {
        "images_per_second": batch_size / step_seconds,
        "images_per_second_per_rank": batch_size / step_seconds / rank_info.world_size,
        "step_seconds": step_seconds,
        "step_seconds_10": _mean(tenths[0]),
        "step_seconds_50": _mean(statistics.median(seconds)),
        "step_seconds_90": _mean(tenths[-1]),
        "data_wait": phase_times["data"].mean / step_seconds,
        "phases": phase_metrics(phase_times),
    }
    if train_step and rank_info.world_size > 1:
        figures["communication"] = _communication(step, device, warmup + steps) / step_seconds
    if watts:
        figures["watts_per_rank"] = _mean(statistics.mean(watts))
    if train_step:
        figures |= peak_memory(device)
        flops = step_flops(config) / step_seconds / rank_info.world_size
        figures["teraflops"] = flops / 1e12
        if rated := peak_flops(device):
            figures["mfu"] = flops / rated
    return figures


def _mean(value: float) -> float:
    """Return the mean over ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _power(device: torch.device) -> list[float]:
    """Return the current power draw of this rank's GPU in watts; an empty list if it is not available."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.power_draw(device) / 1e3]
    except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is not installed, or the GPU does not measure it
        return []


def _communication(step: Callable[[int], None], device: torch.device, first: int) -> float:
    """Return the seconds of a step in which a collective runs on a rank, averaged over ranks.

    Collectives are NCCL's kernels or gloo's operations in the trace of torch's profiler. Time that is hidden by
    computation counts, too.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler reports a machine without a GPU as an error
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for number in range(first, first + TRACED_STEPS):
            step(number)
    spans = []
    for event in profiler.events() or []:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if (on_gpu and "nccl" in event.name.lower()) or event.name.startswith("gloo:"):
            spans.append((event.time_range.start, event.time_range.end))
    return _mean(_union_length(spans) / 1e6) / TRACED_STEPS  # the profiler counts microseconds


def _union_length(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as two tables and write it to `out` as JSON. Called by rank 0."""
    modes: dict[str, dict[str, Any]] = result["modes"]
    where = f"{result['ranks']} ranks on {result['nodes']} nodes, {result['device']}"
    print_table(
        f"{result['backbone']}, {result['method']}, batch {result['batch_size']}, {result['engine']}; {where}",
        ("", *modes),
        [
            (label, *(write(figures[key]) if key in figures else "" for figures in modes.values()))
            for label, key, write in _ROWS
            if any(key in figures for figures in modes.values())
        ],
    )
    names = dict.fromkeys(name for figures in modes.values() for name in figures["phases"])
    print_table(
        "milliseconds per step by phase, mean over ranks (slowest rank)",
        ("", *modes),
        [
            (name, *(_phase(figures["phases"].get(name), result["ranks"]) for figures in modes.values()))
            for name in names
        ],
    )
    write_result(out, result)


_ROWS = (
    ("images/s", "images_per_second", lambda x: f"{x:,.1f}"),
    ("images/s a rank", "images_per_second_per_rank", lambda x: f"{x:,.1f}"),
    ("step", "step_seconds", lambda x: f"{1e3 * x:,.1f} ms"),
    ("  10th percentile", "step_seconds_10", lambda x: f"{1e3 * x:,.1f} ms"),
    ("  median", "step_seconds_50", lambda x: f"{1e3 * x:,.1f} ms"),
    ("  90th percentile", "step_seconds_90", lambda x: f"{1e3 * x:,.1f} ms"),
    ("waiting for data", "data_wait", lambda x: f"{100 * x:.1f} %"),
    ("collectives", "communication", lambda x: f"{100 * x:.1f} %"),
    ("memory", "memory_gib", lambda x: f"{x:.2f} GiB"),
    ("reserved memory", "reserved_gib", lambda x: f"{x:.2f} GiB"),
    ("model FLOPs a rank", "teraflops", lambda x: f"{x:.3g} TFLOP/s"),
    ("MFU", "mfu", lambda x: f"{100 * x:.1f} %"),
    ("power a rank", "watts_per_rank", lambda x: f"{x:.0f} W"),
)


def _phase(phase: dict[str, Any] | None, ranks: int) -> str:
    if phase is None:
        return ""
    slowest = f" ({1e3 * phase['slowest']:.1f})" if ranks > 1 else ""
    return f"{1e3 * phase['seconds']:.1f}{slowest}"


def compare(before: Path, after: Path) -> None:
    """Print two results of `run` side by side: which settings differ, and the ratio of each figure.

    Raises:
        ValueError: A file is not a result of `run`, or the two have no mode in common.
    """
    old, new = (read_json(path) for path in (before, after))
    for path, result in ((before, old), (after, new)):
        if "modes" not in result:
            raise ValueError(f"{path}: not a file of bench throughput --out")
    common = [mode for mode in old["modes"] if mode in new["modes"]]
    if not common:
        raise ValueError(
            f"{before} has {', '.join(old['modes'])}, {after} has {', '.join(new['modes'])}: need a common mode"
        )
    for key in old:
        if key != "modes" and old[key] != new.get(key):
            Console().print(f"{key}: {old[key]} → {new.get(key)}", highlight=False, markup=False)
    for mode in common:
        a, b = old["modes"][mode], new["modes"][mode]
        rows = [
            (label, write(a[key]), write(b[key]), f"{b[key] / a[key]:.2f}" if a[key] else "")
            for label, key, write in _ROWS
            if key in a and key in b
        ]
        for name, phase in a["phases"].items():
            x, y = phase["seconds"], b["phases"].get(name, {}).get("seconds")
            if x and y:
                rows.append((f"  {name}", f"{1e3 * x:.1f} ms", f"{1e3 * y:.1f} ms", f"{y / x:.2f}"))
        print_table(mode, ("", before.stem, after.stem, "ratio"), rows)
