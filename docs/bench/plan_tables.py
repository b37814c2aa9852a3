"""Prints the tables of docs/plan.md: AdCo's recipe on A100s, with and without a compiled encoder and a CUDA graph.

    python docs/bench/plan_tables.py > TABLES.md

Each case is run dry once (`trainer.plan.dry_run`); the engine's variants are predicted from the same events.
"""

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))

from trainer.config import Config
from trainer.config_file import load
from trainer.plan.calibrate import Calibration
from trainer.plan.cases import PlanCase, replaced
from trainer.plan.hardware import make_cluster
from trainer.plan.planner import DryRuns, PlanRow, _Planner
from trainer.plan.request import IMAGENET

RECIPE, NODES, GPUS, IMAGES = "configs/adco_r50_800ep.yaml", (1, 16, 128), 8, (32, 256)
ENGINES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "graph": {"cuda_graph": True},
    "compile": {"compile": "encoder"},
    "compile, graph": {"compile": "encoder", "cuda_graph": True},
}


def print_cases(rows: dict[str, list[PlanRow]]) -> None:
    """Print a table of cases by variant."""
    columns = ("engine", "nodes", "GPUs", "batch", "sent MB", "net ms", "step ms", "images/s", "eff.", "binds", "hours")
    print("|", " | ".join((*columns, "GPU-hours", "GPU-hours for ImageNet once")), "|")
    print("|" + "---|" * (len(columns) + 2))
    for name, cases in rows.items():
        for row in cases:
            efficiency = row.images_per_second / row.gpus / (cases[0].images_per_second / cases[0].gpus)
            once = IMAGENET / row.images_per_second / 3600 * row.gpus
            numbers = (
                name, row.case.nodes, f"{row.gpus:,}", f"{row.batch:,}", f"{row.step.sent / 1e6:,.0f}",
                f"{1e3 * row.step.network:.1f}", f"{1e3 * row.step.seconds:.1f}", f"{row.images_per_second:,.0f}",
                f"{100 * efficiency:.0f} %", row.step.bottleneck, f"{row.hours:.1f}", f"{row.hours * row.gpus:,.0f}",
                f"{once:.3f}",
            )  # fmt: skip
            print("|", " | ".join(map(str, numbers)), "|")


def print_step(row: PlanRow) -> None:
    """Print a table of a step's phases, in milliseconds."""
    columns = ("phase", "compute", "memory", "host", "network", "hidden", "sent MB", "takes", "of step")
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    step = row.step
    for p in step.phases:
        times = [f"{1e3 * seconds:.2f}" for seconds in (p.compute, p.memory, p.host, p.network, p.hidden)]
        share = f"{100 * p.seconds / step.seconds:.1f} %"
        print("|", " | ".join((p.phase, *times, f"{p.sent / 1e6:.2f}", f"{1e3 * p.seconds:.2f}", share)), "|")
    for name, seconds in (("waiting for Python", step.idle), ("waiting for the slowest", step.waiting)):
        if seconds:
            print(f"| {name} | | | | | | | {1e3 * seconds:.2f} | {100 * seconds / step.seconds:.1f} % |")
    print(f"| step | | | {1e3 * step.host:.2f} | | | | {1e3 * step.seconds:.2f} | |")


def main() -> None:
    """Print all tables."""
    logging.disable(logging.WARNING)
    config: Config = replaced(load(Path(RECIPE)), {"method": {"bn_group": None}})
    cluster = make_cluster("a100", GPUS, "ib-hdr")
    with DryRuns(config, "a100") as dry_runs:
        for images in IMAGES:
            cases = [PlanCase("ddp", config.bank.placement, nodes, images) for nodes in NODES]
            rows = {}
            for name, engine in ENGINES.items():
                own = replaced(config, {"engine": engine})
                rows[name] = _Planner(own, IMAGENET, cluster, Calibration(None, None), dry_runs).rows(cases)
            print(f"\n{images} images per GPU\n")
            print_cases(rows)
            for name, found in rows.items():
                print(f"\n{images} images on {found[0].gpus} GPUs, {name}\n")
                print_step(found[0])


if __name__ == "__main__":
    main()
