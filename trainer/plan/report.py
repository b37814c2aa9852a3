"""The plan as tables, and as JSON."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trainer.config import Config
from trainer.plan.memory import OVERHEAD_BYTES, OVERHEAD_SHARE, PARTS, name_of
from trainer.plan.predict import BANDWIDTH, CUDA_CORES, JITTER, LAUNCH_SECONDS, TENSOR_CORES
from trainer.plan.rows import IMAGENET, Plan, Row, Target

WIDTH = 120


def report(plan: Plan, config: Config, price: float | None, out: Path | None) -> None:
    """Print it and write it to `out` as JSON. price: of an hour of a GPU."""
    console = Console(width=min(WIDTH, Console().width) if Console().is_terminal else WIDTH, highlight=False)
    own, target = name_of(config.engine), plan.target
    if plan.timed:
        console.print(_times(plan, config, price))
    if plan.left_out:
        reason = next(iter(plan.left_out.values())).removeprefix("plan: ")
        console.print(f"left out: {', '.join(map(str, plan.left_out))} nodes; {reason}", markup=False)
    if plan.timed:
        first, last = plan.rows[0], plan.rows[-1]
        for row in (first, last) if first.gpus != last.gpus else (first,):
            console.print("", _budget(row))
    console.print("", _memory(plan.rows, config, target))
    if plan.candidates:
        console.print("", _compared(plan))
    for line in (*_advice(plan, own), *_assumptions(plan, config)):
        console.print(line, markup=False)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "torch": torch.__version__,
            "gpu": target.gpu,
            "net": target.net,
            "images": target.images,
            "data_rate": target.data_rate,
            "factors": target.factors,
            "timed": plan.timed,
            "best": plan.best.case._asdict() if plan.best else None,
        }
        lists = {
            name: ",\n".join(json.dumps(_as_json(row, plan.rows[0], price)) for row in rows)
            for name, rows in (("rows", plan.rows), ("candidates", plan.candidates))
        }
        text = json.dumps(head)[:-1] + "".join(f', "{name}": [\n{lines}\n]' for name, lines in lists.items()) + "}\n"
        out.write_text(text, encoding="utf-8")


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _times(plan: Plan, config: Config, price: float | None) -> Table:
    target = plan.target
    table = _table(
        f"{config.model.backbone}, {config.method.name}, {config.run.epochs} epochs of {target.images:,} images; "
        f"{target.cluster.gpu.name}, {target.cluster.gpus_per_node} a node, {_net(target)}",
        ("engine", "bank"),
        ("nodes", "GPUs", "batch", "a GPU", "GiB", "sent MB", "net ms", "step ms", "images/s", "eff.", "binds",
         "hours", "GPU-h", *(["cost"] if price else [])),
    )  # fmt: skip
    for row in plan.rows:
        table.add_row(
            row.case.engine,
            row.case.placement if config.method.negatives != "none" else "",
            f"{row.case.nodes:,}",
            f"{row.gpus:,}",
            f"{row.batch:,}",
            f"{row.case.images:,}",
            f"{row.memory.peak / 2**30:.1f}" + ("" if row.fits else "!"),
            f"{row.step.sent / 1e6:,.1f}",
            f"{1e3 * row.step.network:,.1f}",
            f"{1e3 * row.step.seconds:,.1f}",
            f"{row.images_per_second:,.0f}",
            f"{100 * _efficiency(row, plan.rows[0]):.0f} %",
            row.step.bottleneck,
            f"{row.hours:,.1f}",
            f"{row.hours * row.gpus:,.0f}",
            *([f"{row.hours * row.gpus * price:,.0f}"] if price else []),
        )
    return table


def _budget(row: Row) -> Table:
    """Of a step of a row, by phase."""
    table = _table(
        f"a step on {row.gpus:,} GPUs, {row.case.images} images each, {row.case.engine}, milliseconds",
        ("phase",),
        ("compute", "memory", "host", "network", "hidden", "sent MB", "takes", "of step"),
    )
    step = row.step
    for phase in step.phases:
        figures = (phase.compute, phase.memory, phase.host, phase.network, phase.hidden)
        table.add_row(
            phase.phase,
            *(f"{1e3 * x:.2f}" for x in figures),
            f"{phase.sent / 1e6:,.2f}",
            f"{1e3 * phase.seconds:.2f}",
            f"{100 * phase.seconds / step.seconds:.1f} %",
        )
    for name, took in (("waiting for the slowest", step.waiting), ("waiting for data", step.data)):
        if took:
            table.add_row(name, *[""] * 6, f"{1e3 * took:.2f}", f"{100 * took / step.seconds:.1f} %")
    return table


def _memory(rows: list[Row], config: Config, target: Target) -> Table:
    on = "on the CPU" if target.gpu == "cpu" else "on a GPU"
    table = _table(f"GiB a rank {on}", ("engine",), ("GPUs", "a GPU", *PARTS, "peak", "in", "fits on"))
    for row in rows:
        table.add_row(
            row.case.engine,
            f"{row.gpus:,}",
            f"{row.case.images:,}",
            *(f"{getattr(row.memory, part) / 2**30:.2f}" for part in (*PARTS, "peak")),
            row.memory.phase,
            row.memory.fits_on or "none",
        )
    return table


def _compared(plan: Plan) -> Table:
    """The candidates, with the best one marked."""
    gpus = plan.candidates[0].gpus
    table = _table(
        f"on {gpus:,} GPUs",
        ("", "engine", "bank"),
        ("a GPU", "batch", "GiB", "sent MB", "net ms", "step ms", "images/s", "binds"),
    )
    for row in plan.candidates:
        table.add_row(
            "*" if row is plan.best or (plan.best and row.case == plan.best.case) else "",
            row.case.engine,
            row.case.placement,
            f"{row.case.images:,}",
            f"{row.batch:,}",
            f"{row.memory.peak / 2**30:.1f}" + ("" if row.fits else "!"),
            f"{row.step.sent / 1e6:,.1f}",
            f"{1e3 * row.step.network:,.1f}",
            f"{1e3 * row.step.seconds:,.1f}",
            f"{row.images_per_second:,.0f}",
            row.step.bottleneck,
        )
    return table


def _advice(plan: Plan, own: str) -> list[str]:
    if not plan.candidates:
        return []
    if plan.best is None:
        return ["none of these fits: take optim.accumulate, engine.activation_checkpointing or larger GPUs"]
    best, given = plan.best, plan.candidates[0]
    kind = {
        "zero1": "deepspeed engine.stage=1",
        "zero2": "deepspeed engine.stage=2",
        "zero3": "deepspeed engine.stage=3",
    }
    lines = [
        f"best: engine.kind={kind.get(best.case.engine, best.case.engine)} bank.placement={best.case.placement} "
        f"data.batch_size={best.batch}: {best.images_per_second:,.0f} images/s, {best.hours:,.1f} hours, bound by "
        f"{best.step.bottleneck}"
    ]
    if best.batch > given.batch:
        lines.append(
            f"the batch is {best.batch // given.batch} times the one given, for "
            f"{best.images_per_second / given.images_per_second:.2f} times the speed; accuracy may change with it"
        )
    if best.step.bottleneck == "host":
        lines.append("the GPU waits for Python: a larger batch a GPU, or engine.compile=true, gives it more to do")
    return lines


def _assumptions(plan: Plan, config: Config) -> list[str]:
    target = plan.target
    lines = []
    if target.gpu != "cpu":
        lines.append(
            f"GiB: without DALI, CUDA and NCCL; it fits with {100 * OVERHEAD_SHARE:.0f} % and "
            f"{OVERHEAD_BYTES / 2**30:.0f} GiB more, ! where it does not"
        )
    if plan.timed:
        source = (
            f"{100 * TENSOR_CORES:.0f} % of the tensor cores' peak, {100 * CUDA_CORES:.0f} % without them, "
            f"{100 * BANDWIDTH:.0f} % of the memory's rate, {1e6 * LAUNCH_SECONDS:.0f} µs of Python an operator"
        )
        lines.append(
            f"assumed: {'phases as measured in the file, else ' if target.factors else ''}{source}; "
            f"NCCL's latencies; ranks that differ by {100 * JITTER:.0f} %"
        )
        rate = f"{target.data_rate:,.0f} images/s a node" if target.data_rate else "taken to keep up (--data-rate)"
        lines.append(f"loader: {rate}; without evaluation and saving; docs/plan.md has all assumptions")
        if target.images == IMAGENET:
            lines.append("images: those of ImageNet (--images)")
    else:
        lines.append("run.device=cpu: times need --calibrate with a file of bench throughput")
    if config.engine.compile:
        lines.append("counted without engine.compile")
    return lines


def _net(target: Target) -> str:
    return target.net if not target.net[0].isdigit() else f"{target.net} Gb/s a node"


def _efficiency(row: Row, first: Row) -> float:
    """Images/s of a GPU against the first row's."""
    return row.images_per_second / row.gpus / (first.images_per_second / first.gpus)


def _as_json(row: Row, first: Row, price: float | None) -> dict[str, Any]:
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
        "waiting_seconds": row.step.waiting,
        "data_seconds": row.step.data,
        "phases": [{**phase._asdict(), "seconds": phase.seconds} for phase in row.step.phases],
    }
