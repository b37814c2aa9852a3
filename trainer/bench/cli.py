"""The verbs `bench` and `scale` of the command line. Each imports what it needs, so that --help is quick."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/demo.yaml", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the file's: optim.lr=0.06", metavar="[KEY=VALUE]...")
]
OutPath = Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")]
StudyPath = Annotated[Path, typer.Argument(help="Directory of the study", metavar="FOLDER")]
Precision = Literal["fp32", "fp16", "bf16"]

bench_app = typer.Typer(no_args_is_help=True)
scale_app = typer.Typer(no_args_is_help=True, help="Measure how throughput grows with the number of nodes.")


@bench_app.callback()
def bench() -> None:
    """Measure speed and memory on this machine."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # hides errors of torch's profiler without a GPU


@bench_app.command("kernels")
def bench_kernels(
    rows: Annotated[int, typer.Option(help="Number of queries N, and of keys", min=1)] = 1024,
    negatives: Annotated[int, typer.Option(help="Number of negatives K", min=1)] = 65536,
    dim: Annotated[int, typer.Option(help="Dimensions D of an embedding", min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    repeats: Annotated[int, typer.Option(help="Number of repetitions; results are medians", min=1)] = 7,
    static: Annotated[bool, typer.Option("--static", help="Count registers and instructions; needs no GPU")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Find and store this GPU's fastest tile sizes")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file (--static: CSV).")] = None,
) -> None:
    """Time loss, gradient and bank update against the formulation that stores N x K tensors.

    --static compiles the Triton kernels for sm_80 and sm_90 and prints the least time each can take.
    --tune rewrites kernels/triton/tiles.csv for this GPU's architecture.
    """
    if static and tune:
        raise ValueError("bench kernels: got --static and --tune, need one of them")
    if tune and out:
        raise ValueError("bench kernels: got --tune and --out, but --tune writes kernels/triton/tiles.csv only")
    if static:
        from trainer.bench import static as compiled
        from trainer.plan import roofline

        compiled.report(compiled.run(compiled.jobs()), out)
        roofline.report(roofline.rows((256, 1024, 4096), (65536, 2**20), 128, "bfloat16"))
        return
    if tune:
        from trainer.bench.gpu import kernels as gpu_kernels

        gpu_kernels.tune(gpu_kernels.require_gpu(), repeats)
        return
    from trainer.bench import kernels

    kernels.report(kernels.run(rows, negatives, dim, dtype, repeats), out)


@bench_app.command("gpu")
def bench_gpu(
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="cpu: run every line on small sizes; its times mean nothing")
    ] = "cuda",
    parts: Annotated[str, typer.Option(help="Comma-separated names of parts; all if not given")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the record", metavar="FOLDER")] = Path("runs/gpu-record"),
) -> None:
    """Check and measure everything on a GPU in ten minutes, without data: results, speed, memory, engines.

    Compares each number with the CPU's, the planner's or the roofline's, and writes a record to send in.
    """
    from trainer.bench.gpu import parts as gpu_parts

    names = [name.strip() for name in parts.split(",")] if parts else None
    if not gpu_parts.run(device, names, out):
        raise typer.Exit(1)


@bench_app.command("bank")
def bench_bank(
    negatives: Annotated[int, typer.Option(help="Number of negatives K", min=1)] = 2**20,
    rows: Annotated[int, typer.Option(help="Number of queries N, and of keys", min=1)] = 256,
    dim: Annotated[int, typer.Option(help="Dimensions D of an embedding", min=1)] = 128,
    precision: Annotated[Precision, typer.Option(help="Type of queries, keys and unit rows in products")] = "fp32",
    weights: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the weights")] = "fp32",
    velocity: Annotated[Literal["fp32", "bf16", "none"], typer.Option(help="Type of the velocity")] = "fp32",
    steps: Annotated[int, typer.Option(help="Number of steps", min=1)] = 3,
    out: OutPath = None,
) -> None:
    """Time one process's bank update, and compare its memory with that of storing N x K tensors."""
    from trainer.bench import bank

    bank.report(bank.run(rows, negatives, dim, precision, weights, velocity, steps), out)


@bench_app.command("step")
def bench_step(
    config: ConfigPath,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(help="Number of repetitions; results are medians", min=1)] = 15,
    out: OutPath = None,
) -> None:
    """Time a training step of CONFIG against the bare forward, backward, optimizer and moving average."""
    from trainer.bench import step
    from trainer.config_file import load

    step.report(step.run(load(config, overrides), repeats), out)


@bench_app.command("throughput")
def bench_throughput(
    config: ConfigPath,
    overrides: Overrides = None,
    mode: Annotated[
        Literal["all", "full", "synthetic", "data"],
        typer.Option(help="full: as in training; synthetic: without the loader; data: the loader alone"),
    ] = "all",
    steps: Annotated[
        int, typer.Option(help="Number of timed steps, rounded up to a multiple of the loader's workers", min=2)
    ] = 50,
    warmup: Annotated[
        int, typer.Option(help="Minimum number of steps before them; as many as batches are made ahead", min=1)
    ] = 10,
    out: OutPath = None,
) -> None:
    """Measure images/s of training CONFIG here, or under torchrun on many machines; time by phase, memory, MFU."""
    from trainer.bench import throughput
    from trainer.config_file import load

    result = throughput.run(load(config, overrides), throughput.MODES if mode == "all" else (mode,), steps, warmup)
    if int(os.environ.get("RANK") or 0) == 0:
        throughput.report(result, out)


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="File written by bench throughput --out", metavar="BEFORE.json")],
    after: Annotated[Path, typer.Argument(help="Another such file", metavar="AFTER.json")],
) -> None:
    """Compare two results of bench throughput."""
    from trainer.bench import throughput

    throughput.compare(before, after)


@bench_app.command("save")
def bench_save(
    config: ConfigPath,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder to write to; the system's temporary folder if not given")
    ] = None,
    saves: Annotated[int, typer.Option(help="Number of checkpoints to write", min=1)] = 3,
    out: OutPath = None,
) -> None:
    """Time a checkpoint of CONFIG: the copy that training waits for, and training steps while it is written."""
    from trainer.bench import save
    from trainer.config_file import load

    save.report(save.run(load(config, overrides), folder, saves), out)


@bench_app.command("traffic")
def bench_traffic(
    rows: Annotated[int, typer.Option(help="Number of queries N over all ranks, and of keys", min=1)] = 4096,
    dim: Annotated[int, typer.Option(help="Dimensions D of an embedding", min=1)] = 128,
    negatives: Annotated[list[int], typer.Option(help="Number of negatives K (repeatable)", min=1)] = [65536, 2**20],  # noqa: B006
    ranks: Annotated[
        list[int], typer.Option(help="Number of ranks (repeatable); up to 8 are processes, more are simulated", min=1)
    ] = [64, 1024],  # noqa: B006
    out: OutPath = None,
) -> None:
    """Count the bytes that a rank sends per step for each placement of the bank and the published formulation."""
    from trainer.bench import traffic

    traffic.report(traffic.run(rows, negatives, dim, ranks), out)


@bench_app.command("data")
def bench_data(
    config: ConfigPath,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(help="Seconds per measurement of a backend", min=0.1)] = 5.0,
    repeats: Annotated[int, typer.Option(help="Number of measurements; results are medians", min=1)] = 3,
    workers: Annotated[int | None, typer.Option(help="Worker processes of the backends cpu and dali", min=1)] = None,
    out: OutPath = None,
) -> None:
    """Measure images/s of each data backend, the cost of each operation, and images/s that training needs."""
    import tempfile

    from trainer.bench import data
    from trainer.config_file import load

    with tempfile.TemporaryDirectory() as folder:
        data.report(data.run(load(config, overrides), Path(folder), seconds, repeats, workers), out)


@bench_app.command("feed")
def bench_feed(
    config: ConfigPath,
    overrides: Overrides = None,
    batch_size: Annotated[list[int], typer.Option(help="Images per batch (repeatable)", min=1)] = [32, 256],  # noqa: B006
    batches: Annotated[int, typer.Option(help="Number of batches per measurement", min=1)] = 20,
    repeats: Annotated[int, typer.Option(help="Number of measurements; results are medians", min=1)] = 3,
    out: OutPath = None,
) -> None:
    """Measure what feeding DALI costs the thread that launches the training step."""
    import tempfile

    from trainer.bench import feed
    from trainer.config_file import load

    with tempfile.TemporaryDirectory() as folder:
        feed.report(feed.run(load(config, overrides), Path(folder), batch_size, batches, repeats), out)


@scale_app.command("submit")
def scale_submit(
    config: ConfigPath,
    folder: StudyPath,
    overrides: Overrides = None,
    sizes: Annotated[str, typer.Option(help="Numbers of nodes, or of processes with --local")] = "1,2,4",
    kind: Annotated[
        Literal["both", "strong", "weak"], typer.Option(help="strong: fixed batch size; weak: fixed per node")
    ] = "both",
    local: Annotated[bool, typer.Option("--local", help="Run processes on this machine, without SLURM")] = False,
    sbatch: Annotated[str, typer.Option(help="Options for sbatch: '--partition=gpu --gpus-per-node=8'")] = "",
    mode: Annotated[Literal["full", "synthetic"], typer.Option(help="Mode of bench throughput")] = "full",
    steps: Annotated[int, typer.Option(help="Number of timed steps at each size", min=2)] = 50,
    warmup: Annotated[int, typer.Option(help="Number of steps before the timed ones", min=1)] = 10,
) -> None:
    """Measure CONFIG at each size that FOLDER has no result for, by one SLURM job each or by local processes."""
    from trainer.bench.scaling import submit

    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"--sizes: got {sizes}, need numbers from 1 on, such as 1,2,4")
    arguments = ["--mode", mode, "--steps", str(steps), "--warmup", str(warmup)]
    kinds = ["strong", "weak"] if kind == "both" else [kind]
    for line in submit(config, overrides or [], folder, numbers, kinds, local, shlex.split(sbatch), arguments):  # type: ignore[arg-type]
        print(line)


@scale_app.command("collect")
def scale_collect(folder: StudyPath) -> None:
    """Print a table of the results so far: images/s, speedup, efficiency, communication."""
    from trainer.bench.scaling import report

    report(folder)


@scale_app.command("plot")
def scale_plot(folder: StudyPath) -> None:
    """Write FOLDER/scaling.png and FOLDER/scaling.html."""
    from trainer.bench.scaling import plot

    print(*plot(folder), sep="\n")
