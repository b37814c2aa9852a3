"""Prints a plan as tables and writes it as JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trainer.config import Config
from trainer.engines import ddp
from trainer.external import short_name
from trainer.plan.cases import ENGINES
from trainer.plan.dry_run import OVERHEAD_BYTES, OVERHEAD_SHARE, PARTS
from trainer.plan.planner import Plan, PlanRow
from trainer.plan.predict import (
    BANDWIDTH,
    COMPILED_LAUNCH_SECONDS,
    CUDA_CORES,
    JITTER,
    KERNEL_SECONDS,
    LAUNCH_SECONDS,
    REPLAYED_LAUNCH_SECONDS,
    TENSOR_CORES,
)
from trainer.plan.request import IMAGENET

WIDTH = 120

# Columns of the tables of rows, by title.
_COLUMNS: dict[str, Callable[[PlanRow], str]] = {
    "engine": lambda row: row.case.engine,
    "placement": lambda row: row.case.placement if row.memory.bank else "",
    "nodes": lambda row: f"{row.case.nodes:,}",
    "GPUs": lambda row: f"{row.gpus:,}",
    "batch": lambda row: f"{row.batch:,}",
    "a GPU": lambda row: f"{row.case.images:,}",
    "GiB": lambda row: f"{row.memory.peak / 2**30:.1f}" + ("" if row.fits else "!"),
    "sent MB": lambda row: f"{row.step.sent / 1e6:,.1f}",
    "net ms": lambda row: f"{1e3 * row.step.network:,.1f}",
    "step ms": lambda row: f"{1e3 * row.step.seconds:,.1f}",
    "images/s": lambda row: f"{row.images_per_second:,.0f}",
    "binds": lambda row: row.step.bottleneck,
    "hours": lambda row: f"{row.hours:,.1f}",
    "GPU-h": lambda row: f"{row.hours * row.gpus:,.0f}",
    **{part: lambda row, part=part: f"{getattr(row.memory, part) / 2**30:.2f}" for part in (*PARTS, "peak")},  # type: ignore[misc]
    "in": lambda row: row.memory.phase,
    "fits on": lambda row: row.memory.fits_on or "none",
}
_LEFT_ALIGNED = ("engine", "placement", "phase", "")


def report(plan: Plan, config: Config, out: Path | None) -> None:
    """Print a plan, and write it to `out` as JSON."""
    console = Console(width=min(WIDTH, Console().width) if Console().is_terminal else WIDTH, highlight=False)
    if plan.timed:
        console.print(_times(plan, config))
    if plan.skipped:
        reason = next(iter(plan.skipped.values())).removeprefix("plan: ")
        console.print(f"skipped: {', '.join(map(str, plan.skipped))} nodes; {reason}", markup=False)
    if plan.timed:
        first, last = plan.rows[0], plan.rows[-1]
        for row in (first, last) if first.gpus != last.gpus else (first,):
            console.print("", _phases(row))
    where = "on the CPU" if plan.request.gpu == "cpu" else "on a GPU"
    columns = ("engine", "GPUs", "a GPU", *PARTS, "peak", "in", "fits on")
    console.print("", _row_table(f"GiB per rank {where}", columns, plan.rows))
    if plan.candidates:
        console.print("", _candidates(plan))
    for line in (*_recommendation(plan), *_assumptions(plan, config)):
        console.print(line, markup=False)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_json(plan), encoding="utf-8")


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in columns:
        left = column in _LEFT_ALIGNED
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    return table


def _row_table(title: str, columns: Sequence[str], rows: list[PlanRow]) -> Table:
    table = _table(title, columns)
    for row in rows:
        table.add_row(*(_COLUMNS[column](row) for column in columns))
    return table


def _times(plan: Plan, config: Config) -> Table:
    request, price = plan.request, plan.request.price
    net = request.net if not request.net[0].isdigit() else f"{request.net} Gb/s a node"
    columns = (
        "engine",
        "placement",
        "nodes",
        "GPUs",
        "batch",
        "a GPU",
        "GiB",
        "sent MB",
        "net ms",
        "step ms",
        "images/s",
    )
    title = (
        f"{short_name(config.model.backbone)}, {short_name(config.method.name)}, {config.run.epochs} epochs of "
        f"{request.images:,} images; "
        f"{plan.cluster.gpu.name}, {request.gpus_per_node} a node, {net}"
    )
    table = _table(title, (*columns, "eff.", "binds", "hours", "GPU-h", *(["cost"] if price else [])))
    for row in plan.rows:
        table.add_row(
            *(_COLUMNS[column](row) for column in columns),
            f"{100 * _efficiency(row, plan.rows[0]):.0f} %",
            *(_COLUMNS[column](row) for column in ("binds", "hours", "GPU-h")),
            *([f"{row.hours * row.gpus * price:,.0f}"] if price else []),
        )
    return table


def _phases(row: PlanRow) -> Table:
    """Return the table of a row's step by phase."""
    table = _table(
        f"a step on {row.gpus:,} GPUs, {row.case.images} images each, {row.case.engine}, milliseconds",
        ("phase", "compute", "memory", "host", "network", "hidden", "sent MB", "takes", "of step"),
    )
    step = row.step
    for phase in step.phases:
        times = (phase.compute, phase.memory, phase.host, phase.network, phase.hidden)
        table.add_row(
            phase.phase,
            *(f"{1e3 * seconds:.2f}" for seconds in times),
            f"{phase.sent / 1e6:,.2f}",
            f"{1e3 * phase.seconds:.2f}",
            f"{100 * phase.seconds / step.seconds:.1f} %",
        )
    waits = {"waiting for Python": step.idle, "waiting for the slowest": step.waiting, "waiting for data": step.data}
    for name, seconds in waits.items():
        if seconds:
            table.add_row(name, *[""] * 6, f"{1e3 * seconds:.2f}", f"{100 * seconds / step.seconds:.1f} %")
    return table


def _candidates(plan: Plan) -> Table:
    """Return the table of all candidates, with a star for the best."""
    columns = ("engine", "placement", "a GPU", "batch", "GiB", "sent MB", "net ms", "step ms", "images/s", "binds")
    table = _table(f"on {plan.candidates[0].gpus:,} GPUs", ("", *columns))
    for row in plan.candidates:
        star = "*" if plan.best and row.case == plan.best.case else ""
        table.add_row(star, *(_COLUMNS[column](row) for column in columns))
    return table


def _recommendation(plan: Plan) -> list[str]:
    if not plan.candidates:
        return []
    if plan.best is None:
        return ["none of these fits: use optim.accumulate, engine.activation_checkpointing or larger GPUs"]
    best, own = plan.best, plan.candidates[0]
    engine = " ".join(f"engine.{key}={value}" for key, value in ENGINES[best.case.engine].items())
    lines = [
        f"best: {engine} bank.placement={best.case.placement} data.batch_size={best.batch}: "
        f"{best.images_per_second:,.0f} images/s, {best.hours:,.1f} hours, bound by {best.step.bottleneck}"
    ]
    if best.batch > own.batch:
        lines.append(
            f"this batch is {best.batch // own.batch} times the configuration's, for "
            f"{best.images_per_second / own.images_per_second:.2f} times the speed; accuracy may change with it"
        )
    if best.step.bottleneck == "host":
        lines.append(
            "the GPU waits for Python: use engine.cuda_graph, engine.compile=encoder or a larger batch per GPU"
        )
    return lines


def _assumptions(plan: Plan, config: Config) -> list[str]:
    lines, calibration = [], plan.calibration
    if plan.request.gpu != "cpu":
        lines.append(
            f"GiB: without DALI, CUDA and NCCL; it fits with {100 * OVERHEAD_SHARE:.0f} % and "
            f"{OVERHEAD_BYTES / 2**30:.0f} GiB more; ! marks what does not fit"
        )
    if plan.timed:
        measured = "phases as measured in the file, else " if calibration.factors else ""
        lines.append(
            f"assumed: {measured}{100 * TENSOR_CORES:.0f} % of the tensor cores' peak, {100 * CUDA_CORES:.0f} % "
            f"without them, {100 * BANDWIDTH:.0f} % of the memory's rate, {1e6 * LAUNCH_SECONDS:.0f} µs of Python and "
            f"at least {1e6 * KERNEL_SECONDS:.0f} µs of the GPU per operator; NCCL's latencies; ranks that differ by "
            f"{100 * JITTER:.0f} %"
        )
        rate = calibration.data_rate
        loader = f"{rate:,.0f} images/s per node" if rate else "assumed to keep up (--data-rate)"
        lines.append(f"loader: {loader}; without evaluation and saving; docs/plan.md lists all assumptions")
        if plan.request.images == IMAGENET:
            lines.append("images: those of ImageNet (--images)")
    else:
        lines.append("run.device=cpu: times need --calibrate with a file of bench throughput")
    if config.engine.compile == "blocks":
        lines.append("predicted without engine.compile")
    if config.engine.compile == "encoder":
        lines.append(
            "engine.compile=encoder: under ddp, ZeRO-1 and -2, operators between convolutions and products are fused "
            f"and {1e6 * COMPILED_LAUNCH_SECONDS:.0f} µs launch a kernel; memory as without it"
        )
    if isinstance(config.engine, ddp.Settings) and config.engine.cuda_graph:
        lines.append(
            f"engine.cuda_graph: under ddp, {1e6 * REPLAYED_LAUNCH_SECONDS:.1f} µs launch an operator; memory as "
            "without it"
        )
    return lines


def _efficiency(row: PlanRow, first: PlanRow) -> float:
    """Return a GPU's images/s relative to the first row's."""
    return row.images_per_second / row.gpus / (first.images_per_second / first.gpus)


def _json(plan: Plan) -> str:
    """Return the plan as JSON with one line for each row."""
    head = {
        "torch": torch.__version__,
        "gpu": plan.request.gpu,
        "net": plan.request.net,
        "images": plan.request.images,
        "data_rate": plan.calibration.data_rate,
        "factors": plan.calibration.factors,
        "timed": plan.timed,
        "best": plan.best.case._asdict() if plan.best else None,
    }
    lists = {
        name: ",\n".join(json.dumps(_row_dict(row, plan.rows[0], plan.request.price)) for row in rows)
        for name, rows in (("rows", plan.rows), ("candidates", plan.candidates))
    }
    return json.dumps(head)[:-1] + "".join(f', "{name}": [\n{lines}\n]' for name, lines in lists.items()) + "}\n"


def _row_dict(row: PlanRow, first: PlanRow, price: float | None) -> dict[str, Any]:
    return {
        **row.case._asdict(),
        "gpus": row.gpus,
        "batch": row.batch,
        "memory": {**row.memory._asdict(), "peak": row.memory.peak},
        "fits": row.fits,
        "sent": row.step.sent,
        "step_seconds": row.step.seconds,
        "images_per_second": row.images_per_second,
        "efficiency": _efficiency(row, first),
        "binds": row.step.bottleneck,
        "hours": row.hours,
        "gpu_hours": row.hours * row.gpus,
        "cost": row.hours * row.gpus * price if price else None,
        "host_seconds": row.step.host,
        "idle_seconds": row.step.idle,
        "waiting_seconds": row.step.waiting,
        "data_seconds": row.step.data,
        "phases": [{**phase._asdict(), "seconds": phase.seconds} for phase in row.step.phases],
    }
