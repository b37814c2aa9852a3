"""Scaling studies: the throughput of one configuration at several sizes, as SLURM jobs or as local processes.

Strong scaling keeps the batch, so each rank's share shrinks. Weak scaling multiplies the batch by the size.

    FOLDER/weak-00004.json      result of `bench throughput` on 4 nodes (locally: processes)
    FOLDER/weak-00004.job       number of the SLURM job that measures it
    FOLDER/weak-00004.log       output of the local processes
    FOLDER/scaling.json         the table of all sizes; scaling.png and scaling.html draw it
"""

import base64
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.progress import track

from trainer.bench.harness import print_rows
from trainer.config import Config
from trainer.config_file import load
from trainer.report.page import render_page
from trainer.run.files import read_json, write_atomically, write_json

Kind = Literal["strong", "weak"]


class Point(NamedTuple):
    """One size of a study.

    speedup is the ratio of images/s to the smallest size of its kind, linear the ratio of ranks, and efficiency the
    quotient of the two. communication is the share of a step in which a collective runs, None on one rank.
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


COLUMNS: dict[str, Callable[[Point], str]] = {
    "": lambda p: p.kind,
    "nodes": lambda p: str(p.nodes),
    "ranks": lambda p: str(p.ranks),
    "batch": lambda p: f"{p.batch_size:,}",
    "images/s": lambda p: f"{p.images_per_second:,.0f}",
    "a rank": lambda p: f"{p.images_per_second_per_rank:,.1f}",
    "speedup": lambda p: f"{p.speedup:.2f}",
    "linear": lambda p: f"{p.linear:.0f}",
    "efficiency": lambda p: f"{100 * p.efficiency:.1f} %",
    "comm.": lambda p: "" if p.communication is None else f"{100 * p.communication:.1f} %",
    "data wait": lambda p: f"{100 * p.data_wait:.1f} %",
}


def submit(
    path: Path,
    overrides: list[str],
    folder: Path,
    sizes: list[int],
    kinds: list[Kind],
    local: bool,
    options: list[str],
    arguments: list[str],
) -> Iterator[str]:
    """Start `bench throughput` at each size of which `folder` has no result, and yield a line for each size.

    A size whose job SLURM still has is not submitted again. After a local size that fails, the others are measured.

    Args:
        path: The configuration, which `overrides` change.
        overrides: Changes of the configuration, as on the command line.
        folder: Folder of the study.
        sizes: Numbers of nodes, or of processes if `local`.
        kinds: Kinds of scaling.
        local: Run processes of this machine, one size after the other, all with the same number of threads.
        options: Options of sbatch.
        arguments: Options of `bench throughput`.

    Raises:
        ValueError: A size does not divide the batch (before anything is started), a job cannot be submitted, or local
            sizes have failed (after all others).
    """
    config = load(path, overrides)
    jobs = [
        (size, _batch_size(config, kind, size), folder / f"{kind}-{size:05d}.json")
        for kind in kinds
        for size in sorted(sizes)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    measured = [out for _, _, out in jobs if out.exists()]
    failed: list[str] = []
    missing = [job for job in jobs if job[2] not in measured]
    submitted = {out: job for _, _, out in missing if (job := _read_job(out))}
    states = _states_of_jobs() if submitted and not local else {}
    for size, batch_size, out in track(missing, "measuring", disable=not local):
        others = [text for text in overrides if not text.startswith("data.batch_size=")]
        words = [*others, f"data.batch_size={batch_size}", *arguments, "--out", str(out.resolve())]
        if local:
            threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // max(sizes))))
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command = [*launcher, "-m", "trainer", "bench", "throughput", str(path), *words]
            log, environment = out.with_suffix(".log"), _environment(OMP_NUM_THREADS=threads)
            with log.open("w", encoding="utf-8") as file:
                code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
            if code:
                failed.append(str(log))
                yield f"{out.stem} failed: {_last_error(log.read_text(encoding='utf-8', errors='replace'))}"
            else:
                yield f"measured {out}"
            continue
        if (job := submitted.get(out, "")) in states:
            yield f"job {job} is {states[job]} already: {size} nodes, {out}"
            continue
        sbatch = ["sbatch", "--parsable", f"--nodes={size}", *options, "slurm/scaling_study.sh"]
        job = _run([*sbatch, *words], CONFIG=str(path)).strip().split(";")[0]  # a cluster's name may follow
        write_atomically(out.with_suffix(".job"), f"{job}\n")
        yield f"job {job}: {size} nodes, batch {batch_size}, {out}"
    yield from (f"{out} exists already" for out in measured)
    if failed:
        raise ValueError(f"scale: {len(failed)} of {len(missing)} sizes failed; their output is in {', '.join(failed)}")


def _batch_size(config: Config, kind: Kind, size: int) -> int:
    batch_size = config.data.batch_size
    if kind == "strong" and batch_size % size:
        raise ValueError(f"data.batch_size: {batch_size} images do not divide among {size}")
    return batch_size if kind == "strong" else batch_size * size


def _read_job(out: Path) -> str:
    """Return the number of the job that was submitted for a result; "" if none was."""
    path = out.with_suffix(".job")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _states_of_jobs() -> dict[str, str]:
    """Return the state of each job of this user that SLURM has, such as PENDING, by the number of the job."""
    lines = _run(["squeue", "--noheader", "--me", "--format=%i %T"]).splitlines()
    return {job: state for job, state in (line.split() for line in lines)}


def _environment(**variables: str) -> dict[str, str]:
    """Return the environment variables of a command: this process's own and `variables`.

    Those of a job that this process runs in, such as those of salloc, are left out: sbatch and srun would take them as
    options.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    inherited |= {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    return {**inherited, **variables}


def _run(command: list[str], **variables: str) -> str:
    """Run a command with additional environment variables and return its output."""
    try:
        done = subprocess.run(command, env=_environment(**variables), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"scale: {command[0]} is not installed; --local measures on this machine") from error
    if done.returncode:
        raise ValueError(f"scale: {' '.join(command)} failed: {_last_error(done.stderr)}")
    return done.stdout


def _last_error(output: str) -> str:
    """Return the last line with an error; torchrun ends with one of its own, which says only that a rank failed."""
    errors = [line for line in output.splitlines() if "rror:" in line and "ChildFailedError" not in line]
    return errors[-1].strip() if errors else output[-300:].strip()


def collect(folder: Path) -> list[Point]:
    """Return all results in the folder by kind and size. Raises ValueError if there are none."""
    points = []
    for kind in ("strong", "weak"):
        results = sorted(map(read_json, folder.glob(f"{kind}-*.json")), key=lambda result: result["ranks"])
        points += [_point(kind, result, results[0]) for result in results]
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
        kind=kind,
        **{name: result[name] for name in ("nodes", "ranks", "batch_size")},
        **{name: figures[name] for name in ("images_per_second", "images_per_second_per_rank", "data_wait")},
        speedup=speedup,
        linear=linear,
        efficiency=speedup / linear,
        communication=figures.get("communication"),
    )


def report(folder: Path) -> None:
    """Print the table of all sizes and write scaling.json."""
    points = collect(folder)
    print_rows("", COLUMNS, points)
    write_json(folder / "scaling.json", {"points": [point._asdict() for point in points]})


def plot(folder: Path) -> list[Path]:
    """Draw images/s and efficiency against ranks, beside perfect scaling.

    Returns:
        The files scaling.png, and scaling.html with the table.
    """
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
    ticks = sorted({point.ranks for point in points})
    for axes, label in ((speed, "images/s"), (efficiency, "efficiency, %")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.set(xlabel="ranks", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    speed.set_yscale("log", base=2)
    speed.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    efficiency.set_ylim(0, max(105, *(100 * p.efficiency + 5 for p in points)))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    (folder / "scaling.png").write_bytes(image.getvalue())
    html = render_page(
        "scaling.html.j2",
        name=folder.resolve().name,
        image=f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}",
        columns=COLUMNS,
        rows=[[cell(point) for cell in COLUMNS.values()] for point in points],
    )
    write_atomically(folder / "scaling.html", html)
    return [folder / "scaling.png", folder / "scaling.html"]
