"""Counts what Python launches in a step, and measures the host's time by phase.

    python docs/bench/launches.py [RESULT.json]

Operators and collectives are those that torch dispatches on rank 0 of 8 under DDP in bf16 with the recipes' ResNet-50
(`trainer.plan.dry_run`). Times are this process's CPU time on one thread, medians: a ResNet-50 of 8 channels on two
views of 8 x 8 pixels, whose arithmetic is small compared with the work of launching it.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))  # the code in the current directory, which may be another version

import torch
import torch.distributed as dist

from trainer.build import initialise_negatives
from trainer.config import Config
from trainer.config_file import load
from trainer.distributed import RankInfo
from trainer.plan.cases import case_config
from trainer.plan.dry_run import dry_run
from trainer.train_step import Rates, TrainStep

RECIPES = ("adco_r50_800ep", "adco_r50_200ep_sym", "adco_r50_800ep_multicrop")
STEPS, WARM_UP = 25, 5
TINY: dict[str, Any] = {"backbone": "resnet50", "backbone_args": {"channels": [2, 2, 2, 2], "stem_width": 8}, "dim": 16}


def count(recipe: str) -> dict[str, int]:
    """Return the number of operators and collectives of a step by phase."""
    config = load(Path("configs") / f"{recipe}.yaml")
    (run,) = dry_run([case_config(config, "ddp", "sharded", 256, "a100")], 8, 8)
    phases: dict[str, int] = {}
    for event in run.events:
        phases[event.phase or "other"] = phases.get(event.phase or "other", 0) + 1
    return {**phases, "all": sum(phases.values())}


class CpuTime:
    """Adds up the CPU time of each phase, in place of `trainer.run.phases.PhaseTimer`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        start = time.process_time()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - start


def measure(precision: str) -> dict[str, float]:
    """Return the milliseconds of CPU time of a step of the tiny network by phase."""
    values = {
        "run": {"dir": "none", "epochs": 1, "device": "cpu", "precision": precision},
        "data": {"train": "none", "batch_size": 2, "views": [{"size": 8}] * 2},
        "model": TINY,
        "bank": {"size": 64, "init": "random"},
    }
    config = Config.model_validate(values)
    rank_info = RankInfo(torch.device("cpu"), 0, 1, 1)
    train_step = TrainStep(config, rank_info)
    initialise_negatives(train_step.method, config, rank_info, range(2))  # type: ignore[arg-type]
    views = [torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    taken: dict[str, list[float]] = {}
    for step in range(WARM_UP + STEPS):
        train_step.phases = timer = CpuTime()  # type: ignore[assignment]
        with timer("all"):
            train_step.step(views, step, Rates(0.01, 0.01, 0.99))
        others = sum(seconds for phase, seconds in timer.seconds.items() if phase != "all")
        for phase, seconds in {**timer.seconds, "other": timer.seconds["all"] - others}.items():
            taken.setdefault(phase, []).append(1e3 * seconds)
    return {phase: round(statistics.median(values[WARM_UP:]), 3) for phase, values in taken.items()}


def main() -> None:
    """Print the result as JSON, and write it to the file of the first argument."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__, "counts": {recipe: count(recipe) for recipe in RECIPES}}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result["milliseconds"] = {precision: measure(precision) for precision in ("fp32", "bf16")}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
