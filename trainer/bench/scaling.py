"""Scaling studies: the throughput of one configuration at several sizes, as SLURM jobs or as local processes.

strong: the batch stays and is cut finer. weak: the batch grows with the size, so each rank's share stays.

    FOLDER/weak-00004.json      what `bench throughput` wrote on 4 nodes (locally: processes)
    FOLDER/scaling.json         the figures of all; scaling.png, scaling.html
"""

import base64
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trainer.config import Config
from trainer.config_file import load
from trainer.run.files import read_json, write_atomically, write_json

Kind = Literal["strong", "weak"]


class Point(NamedTuple):
    """One size of a study. Ratios are to perfect scaling from the study's smallest size.

    speedup: of images/s over the smallest size's; linear: of the ranks. communication: share of a step in which a
    collective is under way, None on one rank.
    """

    kind: str
    nodes: int
    ranks: int
    batch_size: int
    images_per_second: float
    images_per_second_per_rank: float
    speedup: float
    linear: float
    efficiency: float
    communication: float | None
    data_wait: float


def submit(
    path: Path,
    overrides: list[str],
    folder: Path,
    sizes: list[int],
    kinds: list[Kind],
    local: bool,
    options: list[str],
    arguments: list[str],
) -> list[str]:
    """Start `bench throughput` at each size that `folder` has no result of; says what was started.

    sizes: nodes, or with `local` processes of this machine, which run one after the other, each with the same number of
    threads. options: of sbatch. arguments: of `bench throughput`.
    Raises ValueError where a size does not divide the batch, or a job cannot be started.
    """
    config, started = load(path, overrides), []
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, size, folder / f"{kind}-{size:05d}.json") for kind in kinds for size in sorted(sizes)]
    missing = [job for job in jobs if not job[2].exists()]
    for kind, size, out in track(missing, "measuring", disable=not local):
        batch = _batch_size(config, kind, size)
        settings = [*overrides, f"data.batch_size={batch}", *arguments, "--out", str(out.resolve())]
        if local:
            _run([*_torchrun(size), "bench", "throughput", str(path), *settings], max(sizes))
            started.append(f"measured {out}")
        else:
            command = ["sbatch", "--parsable", f"--nodes={size}", *options, "slurm/scaling_study.sh", *settings]
            job = _run(command, None, CONFIG=str(path))
            started.append(f"job {job.strip()}: {size} nodes, batch {batch}, {out}")
    return started + [f"there is {out} already" for job in jobs if job not in missing for out in [job[2]]]


def _batch_size(config: Config, kind: Kind, size: int) -> int:
    batch = config.data.batch_size
    if kind == "strong" and batch % size:
        raise ValueError(f"data.batch_size: {batch} images do not divide among {size}")
    return batch if kind == "strong" else batch * size


def _torchrun(ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, "-m", "trainer"]


def _run(command: list[str], most_ranks: int | None, **environment: str) -> str:
    """What it prints. most_ranks: of processes that share this machine's cores."""
    if most_ranks:
        threads = max(1, len(os.sched_getaffinity(0)) // most_ranks)
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    try:
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"scale: {command[0]} is not here; --local measures on this machine") from error
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if "error:" in line), done.stderr[-300:])
        raise ValueError(f"scale: {' '.join(command)} failed: {last.strip()}")
    return done.stdout


def collect(folder: Path) -> list[Point]:
    """All results in the folder, by kind and size. Raises ValueError if there are none."""
    points = []
    for kind in ("strong", "weak"):
        results = [read_json(path) for path in sorted(folder.glob(f"{kind}-*.json"))]
        for result in sorted(results, key=lambda r: r["ranks"]):
            points.append(_point(kind, result, min(results, key=lambda r: r["ranks"])))
    if not points:
        raise ValueError(f"{folder}: no results of a scaling study yet")
    return points


def _point(kind: str, result: dict[str, Any], smallest: dict[str, Any]) -> Point:
    mode = "full" if "full" in result["modes"] else next(iter(result["modes"]))
    if mode not in smallest["modes"]:
        raise ValueError(f"scale: the results of {kind} scaling are of different modes")
    figures, base = result["modes"][mode], smallest["modes"][mode]
    speedup = figures["images_per_second"] / base["images_per_second"]
    linear = result["ranks"] / smallest["ranks"]
    return Point(
        kind,
        result["nodes"],
        result["ranks"],
        result["batch_size"],
        figures["images_per_second"],
        figures["images_per_second_per_rank"],
        speedup,
        linear,
        speedup / linear,
        figures.get("communication"),
        figures["data_wait"],
    )


COLUMNS = ("", "nodes", "ranks", "batch", "images/s", "a rank", "speedup", "linear", "efficiency", "comm.", "data wait")


def cells(point: Point) -> list[str]:
    """A row under `COLUMNS`."""
    communication = "" if point.communication is None else f"{100 * point.communication:.1f} %"
    return [
        point.kind,
        str(point.nodes),
        str(point.ranks),
        f"{point.batch_size:,}",
        f"{point.images_per_second:,.0f}",
        f"{point.images_per_second_per_rank:,.1f}",
        f"{point.speedup:.2f}",
        f"{point.linear:.0f}",
        f"{100 * point.efficiency:.1f} %",
        communication,
        f"{100 * point.data_wait:.1f} %",
    ]


def report(folder: Path) -> None:
    """Print the table and write scaling.json."""
    points = collect(folder)
    table = Table(box=None)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for point in points:
        table.add_row(*cells(point))
    Console(width=None if sys.stdout.isatty() else 120).print(table)  # a file has no width to fit
    write_json(folder / "scaling.json", {"points": [point._asdict() for point in points]})


def plot(folder: Path) -> list[Path]:
    """Draw images/s and efficiency against ranks, beside perfect scaling: scaling.png, and a page with the table."""
    from jinja2 import Environment
    from matplotlib.figure import Figure

    points = collect(folder)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    for kind, color in (("strong", "#1f5fd0"), ("weak", "#d1480f")):
        own = [point for point in points if point.kind == kind]
        if own:
            ranks = [point.ranks for point in own]
            speed.plot(ranks, [p.images_per_second for p in own], "o-", color=color, label=f"{kind} scaling")
            linear = [own[0].images_per_second * p.linear for p in own]
            speed.plot(ranks, linear, "--", color=color, alpha=0.5, label="perfect")
            efficiency.plot(ranks, [100 * p.efficiency for p in own], "o-", color=color, label=f"{kind} scaling")
    for axes, label in ((speed, "images/s"), (efficiency, "efficiency, %")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({p.ranks for p in points}), labels=[str(r) for r in sorted({p.ranks for p in points})])
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    speed.set_yscale("log", base=2)
    speed.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    efficiency.set_ylim(0, max(105, *(100 * p.efficiency + 5 for p in points)))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    (folder / "scaling.png").write_bytes(image.getvalue())
    page = Environment(autoescape=True).from_string(_PAGE)
    picture = base64.b64encode(image.getvalue()).decode()
    html = page.render(name=folder.resolve().name, picture=picture, columns=COLUMNS, rows=[cells(p) for p in points])
    write_atomically(folder / "scaling.html", html)
    return [folder / "scaling.png", folder / "scaling.html"]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}: scaling</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 32px auto; max-width: 1100px; padding: 0 16px; color: #1b1f24; }
img { max-width: 100%; } table { border-collapse: collapse; }
td, th { padding: 4px 14px 4px 0; text-align: right; border-top: 1px solid #e1e5ea; }
td:first-child { text-align: left; }
</style></head><body>
<h1>{{ name }}</h1>
<img alt="images per second and efficiency against ranks" src="data:image/png;base64,{{ picture }}">
<table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
</body></html>
"""
