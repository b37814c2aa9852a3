"""How many images/s a configuration trains on a machine or many, and where the time goes.

full: as in training, loader and all. synthetic: the same steps on one batch that is already on the device, so what
the loader costs is the difference. data: the loader alone, without networks.
"""

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from data.batch import Batch
from data.loader import train_batches
from data.sources.open import Source
from trainer import distributed
from trainer.build import autocast_dtype, fill_bank
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.plan.flops import step_flops
from trainer.plan.hardware import peak_flops
from trainer.run.files import read_json, write_json
from trainer.run.metrics import peak_memory, set_up_logging
from trainer.run.phases import PhaseTimer, find_straggler, gather_phase_times, host_names, phase_metrics
from trainer.run.sources import open_training
from trainer.train_step import Rates, TrainStep

log = logging.getLogger(__name__)

Mode = Literal["full", "synthetic", "data"]
MODES: tuple[Mode, ...] = ("full", "synthetic", "data")
TRACED = 3  # steps after the timed ones whose collectives are counted


def run(config: Config, modes: Sequence[Mode], steps: int, warmup: int) -> dict[str, Any]:
    """Each mode's figures, from `steps` steps after `warmup` others. Called by all ranks; all get the same.

    Learning rates are 0, so that a network that nobody watches does not diverge; the arithmetic is that of training.
    """
    with distributed.process_group(config.run.device) as rank_info, tempfile.TemporaryDirectory() as folder:
        set_up_logging(rank_info.rank)
        device = rank_info.device
        train = None
        if set(modes) != {"synthetic"}:
            folders: list[Any] = [folder]
            dist.broadcast_object_list(folders)  # where the listing of a folder of pictures is, if they see it
            shared = folders[0] if os.path.isdir(folders[0]) else folder
            train = open_training(config, Path(shared))
        hosts = host_names()
        train_step = None if set(modes) == {"data"} else TrainStep(config, rank_info)
        if train_step:
            fill_bank(train_step.method.bank, _random(config), rank_info, range(1 << 30))  # type: ignore[arg-type]
        results = {mode: _measure(config, rank_info, mode, train_step, train, hosts, steps, warmup) for mode in modes}
        cuda = rank_info.device.type == "cuda"
        return {
            "backbone": config.model.backbone,
            "method": config.method.name,
            "batch_size": config.data.batch_size,
            "views": [view.size for view in config.data.views],
            "negatives": config.bank.size,
            "placement": config.bank.placement,
            "engine": config.engine.kind,
            "precision": str(autocast_dtype(config, rank_info.device)).removeprefix("torch."),
            "data": f"{config.data.backend_for(device)}, {config.data.workers_for(device)} workers a rank",
            "ranks": rank_info.world_size,
            "nodes": len(set(hosts)),
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "steps": steps,
            "warmup": warmup,
            "modes": results,
        }


def _random(config: Config) -> Config:
    """With a bank that needs no images to begin with."""
    return config.model_copy(update={"bank": config.bank.model_copy(update={"init": "random"})})


def _measure(
    config: Config,
    rank_info: RankInfo,
    mode: Mode,
    train_step: TrainStep | None,
    train: Source | None,
    hosts: list[str],
    steps: int,
    warmup: int,
) -> dict[str, Any]:
    train_step = None if mode == "data" else train_step
    phases = train_step.phases if train_step else PhaseTimer(rank_info.device)
    phases.pop()
    rates = Rates(lr=0.0, bank_lr=0.0, teacher_momentum=config.method.teacher_momentum)
    if mode == "synthetic":
        batches: Iterator[Batch] = repeat(_synthetic(config, rank_info))
    else:
        assert train is not None
        seed, stop = config.run.seed, warmup + steps + TRACED
        batches = train_batches(
            train, config.data, seed, rank_info.rank, rank_info.world_size, 0, stop, rank_info.device
        )

    def step(number: int) -> None:
        with phases("data"):
            batch = next(batches)
        with phases("normalize"):
            views = batch.normalized(rank_info.device)
        if train_step:
            train_step.step(views, number, rates)

    seconds, watts = [], []
    for number in range(warmup + steps):
        if number == warmup:
            phases.pop()
            dist.barrier()
        began = time.perf_counter()
        step(number)
        if rank_info.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warmup:
            seconds.append(time.perf_counter() - began)
            if number % 10 == 0:
                watts += _power(rank_info.device)
    by_phase = gather_phase_times(phases.pop(), steps)
    if rank_info.rank == 0 and (late := find_straggler(by_phase, hosts)):
        log.warning("%s", late)
    step_seconds = _mean(statistics.median(seconds))
    result: dict[str, Any] = {
        "images_per_second": config.data.batch_size / step_seconds,
        "images_per_second_per_rank": config.data.batch_size / step_seconds / rank_info.world_size,
        "step_seconds": step_seconds,
        "step_seconds_10": _mean(statistics.quantiles(seconds, n=10, method="inclusive")[0]),
        "step_seconds_90": _mean(statistics.quantiles(seconds, n=10, method="inclusive")[-1]),
        "data_wait": by_phase["data"].mean / _mean(statistics.mean(seconds)),
        "phases": phase_metrics(by_phase),
        **peak_memory(rank_info.device),
    }
    if train_step and rank_info.world_size > 1:
        result["communication"] = _communication(step, rank_info, warmup + steps) / step_seconds
    if watts:
        result["watts_per_rank"] = _mean(statistics.mean(watts))
    if train_step:
        result["teraflops"] = step_flops(config) / step_seconds / rank_info.world_size / 1e12
        if most := peak_flops(rank_info.device):
            result["mfu"] = result["teraflops"] * 1e12 / most
    return result


def _synthetic(config: Config, rank_info: RankInfo) -> Batch:
    images, generator = config.data.batch_size // rank_info.world_size, torch.Generator().manual_seed(rank_info.rank)
    views = [
        torch.randint(256, (images, view.size, view.size, 3), dtype=torch.uint8, generator=generator).to(
            rank_info.device
        )
        for view in config.data.views
    ]
    return Batch(views, torch.arange(images), [])


def _mean(value: float) -> float:
    """Over ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _power(device: torch.device) -> list[float]:
    """Watts of this rank's GPU now; nothing where it does not say."""
    if device.type != "cuda":
        return []
    try:
        return [torch.cuda.power_draw(device) / 1e3]
    except (ModuleNotFoundError, RuntimeError):  # no nvidia-ml-py, or a GPU that does not measure it
        return []


def _communication(step: Any, rank_info: RankInfo, first: int) -> float:
    """Seconds a step in which this rank has a collective under way, hidden behind arithmetic or not; mean over ranks.

    By torch's profiler: NCCL's kernels, or gloo's operations.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if rank_info.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for number in range(first, first + TRACED):
            step(number)
    spans = []
    for event in profiler.events() or []:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if (on_gpu and "nccl" in event.name.lower()) or event.name.startswith("gloo:"):
            spans.append((event.time_range.start, event.time_range.end))
    return _mean(_covered(spans) / 1e6) / TRACED  # microseconds


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print tables and write the result to `out` as JSON. On rank 0."""
    console, modes = Console(), result["modes"]
    on = f"{result['ranks']} ranks on {result['nodes']} nodes, {result['device']}"
    title = f"{result['backbone']}, {result['method']}, batch {result['batch_size']}, {result['engine']}; {on}"
    table = Table(title=title, box=None)
    table.add_column("")
    for mode in modes:
        table.add_column(mode, justify="right")
    for label, key, write in _ROWS:
        if any(key in figures for figures in modes.values()):
            table.add_row(label, *(write(f[key]) if key in f else "" for f in modes.values()))
    console.print(table)
    table = Table(title="milliseconds a step by phase, mean over ranks (slowest rank)", box=None)
    table.add_column("")
    for mode in modes:
        table.add_column(mode, justify="right")
    for name in dict.fromkeys(name for figures in modes.values() for name in figures["phases"]):
        table.add_row(name, *(_phase(figures["phases"].get(name), result["ranks"]) for figures in modes.values()))
    console.print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)


_ROWS = (
    ("images/s", "images_per_second", lambda x: f"{x:,.1f}"),
    ("images/s a rank", "images_per_second_per_rank", lambda x: f"{x:,.1f}"),
    ("step", "step_seconds", lambda x: f"{1e3 * x:,.1f} ms"),
    ("  a tenth below", "step_seconds_10", lambda x: f"{1e3 * x:,.1f} ms"),
    ("  a tenth above", "step_seconds_90", lambda x: f"{1e3 * x:,.1f} ms"),
    ("waiting for data", "data_wait", lambda x: f"{100 * x:.1f} %"),
    ("collectives under way", "communication", lambda x: f"{100 * x:.1f} %"),
    ("memory", "memory_gib", lambda x: f"{x:.2f} GiB"),
    ("reserved", "reserved_gib", lambda x: f"{x:.2f} GiB"),
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
    """Print two results side by side: what differs in what was run, and the ratio of what was measured.

    Raises ValueError if one is no result of `run`, or they have no mode in common.
    """
    results = [read_json(path) for path in (before, after)]
    for path, result in zip((before, after), results, strict=True):
        if "modes" not in result:
            raise ValueError(f"{path}: not a file of bench throughput --out")
    old, new = results
    common = [mode for mode in old["modes"] if mode in new["modes"]]
    if not common:
        raise ValueError(
            f"{before} has {', '.join(old['modes'])}, {after} {', '.join(new['modes'])}: need a common mode"
        )
    console = Console()
    for key in old:
        if key != "modes" and old[key] != new.get(key):
            console.print(f"{key}: {old[key]} → {new.get(key)}", highlight=False, markup=False)
    for mode in common:
        table = Table("", before.stem, after.stem, "ratio", title=mode, box=None)
        a, b = old["modes"][mode], new["modes"][mode]
        for label, key, write in _ROWS:
            if key in a and key in b:
                table.add_row(label, write(a[key]), write(b[key]), f"{b[key] / a[key]:.2f}" if a[key] else "")
        for name in a["phases"]:
            x, y = (figures["phases"].get(name, {}).get("seconds") for figures in (a, b))
            if x and y:
                table.add_row(f"  {name}", f"{1e3 * x:.1f} ms", f"{1e3 * y:.1f} ms", f"{y / x:.2f}")
        console.print(table)
