"""What the game costs: a training step against the bare work of its networks, and the share of each phase."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.loader import train_batches
from data.sources.open import Source
from trainer import distributed
from trainer.build import fill_bank
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.run.sources import open_training
from trainer.train_step import Rates, TrainStep


def run(config: Config, folder: Path, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` of both, taken in turns on one batch that is already on the device.

    step_seconds: `Learner.step`. bare_seconds: forward of student and teacher on the same views, backward of a sum,
    optimizer step and moving average, nothing else. overhead: the ratio less one. phases: share of the step's time.
    Learning rates are 0, so that neither side drifts.
    """
    with distributed.process_group(config.run.device) as rank_info:
        train = open_training(config, folder)
        train_step, bare = (TrainStep(config, rank_info) for _ in range(2))
        fill_bank(train_step.method.bank, config, rank_info, train)
        views = make_batch(config, rank_info, train)
        rates = Rates(lr=0.0, bank_lr=0.0, teacher_momentum=config.method.teacher_momentum)
        times: dict[str, list[float]] = {"step": [], "bare": []}
        for i in range(repeats + 3):
            for name, action in (
                ("step", lambda i=i: train_step.step(views, i, rates)),
                ("bare", lambda: _bare_step(bare, views, config)),
            ):
                seconds = timed(action, rank_info.device)
                if i >= 3:  # the first ones choose algorithms and allocate
                    times[name].append(seconds)
            if i == 2:
                train_step.phases.pop()
        phases = train_step.phases.pop()
        step, alone = (statistics.median(times[name]) for name in ("step", "bare"))
        return {
            "backbone": config.model.backbone,
            "batch_size": config.data.batch_size,
            "negatives": config.bank.size,
            "device": rank_info.device.type,
            "ranks": rank_info.world_size,
            "repeats": repeats,
            "step_seconds": step,
            "bare_seconds": alone,
            "overhead": step / alone - 1,
            "phases": {name: seconds / sum(phases.values()) for name, seconds in phases.items()},
        }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as a table and write it to `out` as JSON."""
    table = Table(
        title=f"{result['backbone']}, batch {result['batch_size']}, {result['negatives']} negatives", box=None
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("training step", f"{1e3 * result['step_seconds']:.1f} ms")
    table.add_row("bare networks", f"{1e3 * result['bare_seconds']:.1f} ms")
    table.add_row("overhead", f"{100 * result['overhead']:+.1f} %", end_section=True)
    for name, share in result["phases"].items():
        table.add_row(name, f"{100 * share:.1f} %")
    Console().print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_batch(config: Config, rank_info: RankInfo, train: Source) -> list[Tensor]:
    """The first batch's views, normalised, on the device."""
    settings = config.data.model_copy(update={"backend": "cpu", "workers": 0})
    batches = train_batches(train, settings, 0, rank_info.rank, rank_info.world_size, 0, 1, torch.device("cpu"))
    return next(batches).normalized(rank_info.device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _bare_step(train_step: TrainStep, views: list[Tensor], config: Config) -> None:
    method, engine = train_step.method, train_step.engine
    precision, last = train_step.precision, train_step.accumulate - 1
    for number, parts in enumerate(zip(*(view.chunk(train_step.accumulate) for view in views), strict=True)):
        with engine.micro_batch(last=number == last):
            with torch.autocast(views[0].device.type, precision, enabled=precision != torch.float32):
                with torch.no_grad():
                    for j in method.key_views:
                        assert method.teacher
                        method.teacher([parts[j]])
                loss = engine.student([parts[i] for i in method.query_views(len(parts))]).sum()
            engine.backward(loss)
    engine.step(0.0)
    engine.update_teacher(config.method.teacher_momentum)
