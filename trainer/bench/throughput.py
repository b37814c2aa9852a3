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

from data.index import Source
from data.loader import Batch, normalize
from trainer import distributed
from trainer.build import autocast_type, data_backend, data_workers, fill_bank, make_batches
from trainer.config import Config
from trainer.distributed import Place
from trainer.flops import peak, step_flops
from trainer.metrics import memory, set_up_logging
from trainer.phases import Phases, as_row, host_names, spread, straggler
from trainer.run_dir import open_training, read_json, write_json
from trainer.step import Learner, Rates, make_learner

log = logging.getLogger(__name__)

Mode = Literal["full", "synthetic", "data"]
MODES: tuple[Mode, ...] = ("full", "synthetic", "data")
TRACED = 3  # steps after the timed ones whose collectives are counted


def run(config: Config, modes: Sequence[Mode], steps: int, warmup: int) -> dict[str, Any]:
    """Each mode's figures, from `steps` steps after `warmup` others. Called by all ranks; all get the same.

    Learning rates are 0, so that a network that nobody watches does not diverge; the arithmetic is that of training.
    """
    with distributed.started(config.run.device) as place, tempfile.TemporaryDirectory() as folder:
        set_up_logging(place.rank)
        train = None
        if set(modes) != {"synthetic"}:
            folders: list[Any] = [folder]
            dist.broadcast_object_list(folders)  # where the listing of a folder of pictures is, if they see it
            shared = folders[0] if os.path.isdir(folders[0]) else folder
            train = open_training(config, Path(shared))
        hosts = host_names()
        learner = None if set(modes) == {"data"} else make_learner(config, place)
        if learner:
            fill_bank(learner.game.bank, _random(config), place, range(1 << 30))  # type: ignore[arg-type]
        results = {mode: _measure(config, place, mode, learner, train, hosts, steps, warmup) for mode in modes}
        cuda = place.device.type == "cuda"
        return {
            "backbone": config.model.backbone,
            "method": config.method.name,
            "batch_size": config.data.batch_size,
            "views": [view.size for view in config.data.views],
            "negatives": config.bank.size,
            "placement": config.bank.placement,
            "engine": config.engine.kind,
            "precision": str(autocast_type(config, place.device)).removeprefix("torch."),
            "data": f"{data_backend(config, place.device)}, {data_workers(config, place.device)} workers a rank",
            "ranks": place.world,
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
    place: Place,
    mode: Mode,
    learner: Learner | None,
    train: Source | None,
    hosts: list[str],
    steps: int,
    warmup: int,
) -> dict[str, Any]:
    learner = None if mode == "data" else learner
    phases = learner.phases if learner else Phases(place.device)
    phases.take()
    rates = Rates(lr=0.0, bank_lr=0.0, teacher_momentum=config.method.teacher_momentum)
    if mode == "synthetic":
        batches: Iterator[Batch] = repeat(_synthetic(config, place))
    else:
        assert train is not None
        batches = make_batches(config, place, train, 0, warmup + steps + TRACED)

    def step(number: int) -> None:
        with phases("data"):
            batch = next(batches)
        with phases("normalize"):
            views = [normalize(view.to(place.device, non_blocking=True), torch.float32) for view in batch.views]
        if learner:
            learner.step(views, number, rates)

    seconds, watts = [], []
    for number in range(warmup + steps):
        if number == warmup:
            phases.take()
            dist.barrier()
        began = time.perf_counter()
        step(number)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warmup:
            seconds.append(time.perf_counter() - began)
            if number % 10 == 0:
                watts += _power(place.device)
    by_phase = spread(phases.take(), steps)
    if place.rank == 0 and (late := straggler(by_phase, hosts)):
        log.warning("%s", late)
    step_seconds = _mean(statistics.median(seconds))
    result: dict[str, Any] = {
        "images_per_second": config.data.batch_size / step_seconds,
        "images_per_second_per_rank": config.data.batch_size / step_seconds / place.world,
        "step_seconds": step_seconds,
        "step_seconds_10": _mean(statistics.quantiles(seconds, n=10, method="inclusive")[0]),
        "step_seconds_90": _mean(statistics.quantiles(seconds, n=10, method="inclusive")[-1]),
        "data_wait": by_phase["data"].mean / _mean(statistics.mean(seconds)),
        "phases": as_row(by_phase),
        **memory(place.device),
    }
    if learner and place.world > 1:
        result["communication"] = _communication(step, place, warmup + steps) / step_seconds
    if watts:
        result["watts_per_rank"] = _mean(statistics.mean(watts))
    if learner:
        result["teraflops"] = step_flops(config) / step_seconds / place.world / 1e12
        if most := peak(place.device):
            result["mfu"] = result["teraflops"] * 1e12 / most
    return result


def _synthetic(config: Config, place: Place) -> Batch:
    images, generator = config.data.batch_size // place.world, torch.Generator().manual_seed(place.rank)
    views = [
        torch.randint(256, (images, view.size, view.size, 3), dtype=torch.uint8, generator=generator).to(place.device)
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


def _communication(step: Any, place: Place, first: int) -> float:
    """Seconds a step in which this rank has a collective under way, hidden behind arithmetic or not; mean over ranks.

    By torch's profiler: NCCL's kernels, or gloo's operations.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.device.type == "cuda" else [])]
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
