"""The command line: python -m trainer VERB. Each verb imports what it needs, so that --help is quick."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.evaluate.registry import EVALUATIONS, Registration
from trainer.plan.request import PlanRequest, parse_nodes

app = typer.Typer(
    name="python -m trainer",
    help="Adversarial contrastive self-supervised learning of image representations.\n\n"
    "All verbs that compute also run on several processes: torchrun --nproc-per-node N -m trainer VERB …",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench_app = typer.Typer(no_args_is_help=True)
app.add_typer(bench_app, name="bench")
data_app = typer.Typer(no_args_is_help=True, help="List, check and rewrite a data set.")
app.add_typer(data_app, name="data")
scale_app = typer.Typer(no_args_is_help=True, help="Study how throughput grows with nodes.")
app.add_typer(scale_app, name="scale")

CORES = len(os.sched_getaffinity(0))

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/demo.yaml", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the file's: optim.lr=0.06", metavar="[KEY=VALUE]...")
]
RunPath = Annotated[Path, typer.Argument(help="Run directory of a pre-training", metavar="RUN")]
Precision = Literal["fp32", "fp16", "bf16"]
DataPath = Annotated[str, typer.Argument(help="What data.train may be: a folder, shards, an index", metavar="SRC")]
Threads = Annotated[int, typer.Option(help="Pictures read at a time", min=1)]
NetworkName = Annotated[Literal["student", "teacher"], typer.Option(help="Which of the run's networks")]
Step = Annotated[int | None, typer.Option(help="Of the checkpoint, see run.keep_every; the newest if not given")]
OutPath = Annotated[Path | None, typer.Option(help="Write the figures as JSON to this file, too.")]


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pre-train an encoder. In a run directory that has a checkpoint of the same run, it continues.

    SIGTERM, SIGUSR1, Ctrl-C, a file `stop` in the run directory, run.max_minutes or the end of a SLURM job's time make
    it save and end with exit code 75 (under torchrun 0, and stopped.json in the run directory).
    """
    from trainer.config_file import load
    from trainer.pretrain import pretrain

    _stoppable(lambda: pretrain(load(config, overrides)))


def _stoppable(work: Callable[[], None]) -> None:
    """With the exit code that says so where it was asked to end early."""
    from trainer.ops.stop import Stopped, exit_code

    try:
        work()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(exit_code()) from None


@app.command()
def replay(run: RunPath) -> None:
    """Do the step again whose loss or gradient was not finite, and say which modules gave it first.

    On as many ranks as the run had: torchrun …; TRAINER_DEBUG=1 checks more.
    """
    from trainer.ops.replay import replay

    if text := replay(run):
        print(text)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of timm's on Hugging Face", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="The new run directory")],
    overrides: Overrides = None,
    backbone: Annotated[str | None, typer.Option(help="timm's name, such as resnet50, if FILE does not say")] = None,
) -> None:
    """Make a run directory of a checkpoint of AdCo, MoCo, BYOL, SimCLR, DINO, torchvision or timm: docs/ecosystem.md.

    knn, embed and export work on it. KEY=VALUE are of its configuration, as model.small_images=true or data.train=….
    """
    from trainer.interop.import_ import import_weights

    print(import_weights(file, out, backbone, overrides or []))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory, of a pre-training or imported", metavar="RUN")],
    to: Annotated[
        Literal["timm", "torchvision", "detectron2", "onnx", "huggingface"], typer.Option("--format", help="For what")
    ],
    out: Annotated[Path, typer.Option(help="The new file; for huggingface, the new folder")],
    network: NetworkName = "student",
    step: Step = None,
    licence: Annotated[str, typer.Option("--license", help="For the model card, such as apache-2.0")] = "unknown",
) -> None:
    """Write the backbone of a run for timm, torchvision, detectron2, onnxruntime or Hugging Face: docs/ecosystem.md.

    The student by default: it is what AdCo, MoCo, SimCLR and BYOL evaluate. DINO evaluates its teacher.
    """
    from trainer.interop.export import export
    from trainer.interop.weights import CheckpointChoice

    if told := export(run, to, out, CheckpointChoice(network, step), licence):
        print(told)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="Run directory, of a pre-training or imported", metavar="RUN")],
    src: DataPath,
    out: Annotated[Path, typer.Option(help="The new file: .parquet, or .npy with a .csv of names")],
    overrides: Overrides = None,
    network: NetworkName = "student",
    step: Step = None,
    points: Annotated[int, typer.Option(help="Images on the page beside OUT; 0: no page", min=0, max=5000)] = 2000,
) -> None:
    """Features of all images of SRC with their names, and a page with a map of them and their nearest neighbours.

    KEY=VALUE are of eval.batch_size, eval.size (pixels), run.device and the like. See docs/ecosystem.md.
    """
    from trainer.evaluate.embed import embed
    from trainer.interop.weights import CheckpointChoice

    if told := embed(run, src, out, CheckpointChoice(network, step), points, overrides or []):
        print(told)


def _add_evaluation(verb: str, registration: Registration) -> None:
    @app.command(verb, help=registration.help)
    def evaluate(
        run: RunPath,
        overrides: Overrides = None,
        folder_name: Annotated[
            str | None, typer.Option("--name", help="Directory in RUN for the results; named after the verb by default")
        ] = None,
        network: NetworkName = "student",
        step: Step = None,
        seed: Annotated[
            int | None,
            typer.Option(help=f"Same as {registration.seed.format('N')}", min=0, hidden=not registration.seed),
        ] = None,
        fast: Annotated[
            bool, typer.Option("--fast", help=f"Same as {registration.fast}", hidden=not registration.fast)
        ] = False,
    ) -> None:
        from trainer.evaluate.run import run_evaluation
        from trainer.interop.weights import CheckpointChoice

        settings = [*(overrides or []), *registration.overrides(seed, fast)]
        _stoppable(lambda: run_evaluation(verb, run, settings, folder_name, CheckpointChoice(network, step)))


for _verb, _registration in EVALUATIONS.items():
    _add_evaluation(_verb, _registration)


@app.command()
def report(run: RunPath) -> None:
    """Write RUN/report.html: one page with curves, nearest neighbours and what the negatives look like."""
    from trainer.report.run import write_report

    print(write_report(run))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of pre-trainings", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("compare.html"),
) -> None:
    """Several runs in one table and one page: accuracy against epochs, images seen and time, and what differs."""
    from trainer.report.compare import compare

    compare(runs, out)
    print(out)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Check that this machine has what it needs")] = None,
    overrides: Overrides = None,
    bad_nodes: Annotated[
        Path | None, typer.Option(help="Under torchrun: write the names of nodes at fault here")
    ] = None,
) -> None:
    """Tell what this machine has for training, and what a configuration needs and lacks.

    Under torchrun it compares all machines, and exits with 1 if one lacks something, differs, or is slow.
    """
    from trainer.config_file import load

    settings = load(config, overrides) if config else None
    if "GROUP_RANK" in os.environ:
        from trainer.ops.preflight import run_preflight

        fit = run_preflight(settings, bad_nodes)
    else:
        from trainer.ops.doctor import print_checks, run_checks

        fit = print_checks(run_checks(settings))
    if not fit:
        raise typer.Exit(1)


@app.command("config")
def show_config(
    config: ConfigPath,
    overrides: Overrides = None,
    get: Annotated[str | None, typer.Option(help="Only this value, such as run.dir")] = None,
    nodes: Annotated[int, typer.Option(help="With --ranks-per-node", min=1)] = 1,
    ranks_per_node: Annotated[int | None, typer.Option(help="Refuse what cannot train on so many ranks", min=1)] = None,
) -> None:
    """Print the resolved configuration, with everything that CONFIG leaves to the defaults."""
    from trainer.config import check_world
    from trainer.config_file import dump, flatten, load

    resolved = load(config, overrides)
    if ranks_per_node:
        check_world(resolved, nodes * ranks_per_node, ranks_per_node)
    if get is None:
        print(dump(resolved), end="")
        return
    values = flatten(resolved.model_dump(mode="json"))
    if get not in values:
        raise ValueError(f"--get {get}: no such value; python -m trainer config {config} lists them")
    print(values[get])


@data_app.command("index")
def data_index(
    src: DataPath, out: Annotated[Path, typer.Argument(help="The new index; data.train may name it", metavar="OUT.npz")]
) -> None:
    """List the images of a folder or of shards once, so that runs with data.train=OUT.npz need no scan."""
    from data.tools import make_index

    print(make_index(src, out))


@data_app.command("verify")
def data_verify(
    src: DataPath,
    out: Annotated[Path | None, typer.Option(help="Write an index of the readable images to this .npz file")] = None,
    threads: Threads = CORES,
) -> None:
    """Read and decode every image. List the unreadable ones with the reason; the exit code is 1 if there are any."""
    from data.tools import verify

    bad, total = verify(src, out, threads)
    print(*bad, f"{len(bad):,} of {total:,} images cannot be read", sep="\n")
    if bad:
        raise typer.Exit(1)


@data_app.command("shard")
def data_shard(
    src: DataPath,
    dest: Annotated[Path, typer.Argument(help="The new folder for the shards", metavar="DEST")],
    samples: Annotated[int, typer.Option(help="Maximum number of images in a shard", min=1)] = 10_000,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the images with the seed, or keep the order of SRC")] = True,
    seed: int = 0,
    threads: Threads = CORES,
) -> None:
    """Write a data set as tar shards of equal size, with unchanged image files. Repeat the command to continue it."""
    from data.tools import write_shards

    print(write_shards(src, dest, samples, threads, seed if shuffle else None))


@data_app.command("views")
def data_views(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="The new image file", metavar="OUT.png")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Number of images", min=1)] = 8,
) -> None:
    """Draw the first images of a run's first epoch and their views."""
    from data.tools import draw_views
    from trainer.config_file import load
    from trainer.distributed import process_group

    settings = load(config, overrides)
    with process_group(settings.run.device) as rank_info:
        draw_views(settings.data, settings.run.seed, rank_info.device, out, samples)
    print(out)


@app.command("plan")
def show_plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="Numbers of nodes: 1,2,8, or 1..1024 for powers of two")] = "1..16",
    gpu: Annotated[str, typer.Option(help="v100, a100-40, a100, h100 or h200")] = PlanRequest.gpu,
    net: Annotated[
        str, typer.Option(help="Network between nodes: ib-hdr, ib-ndr, ib-edr, efa, ethernet-100 …, or Gb/s of a node")
    ] = PlanRequest.net,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node", min=1)] = PlanRequest.gpus_per_node,
    images_per_gpu: Annotated[
        int | None, typer.Option(help="Set data.batch_size to this times the number of GPUs", min=1)
    ] = PlanRequest.images_per_gpu,
    images: Annotated[int, typer.Option(help="Images of the data set (ImageNet's)", min=1)] = PlanRequest.images,
    price: Annotated[float | None, typer.Option(help="Price of an hour of a GPU, for the cost", min=0)] = None,
    data_rate: Annotated[float | None, typer.Option(help="Images/s that a node's loader delivers", min=1)] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Times measured by bench throughput --out FILE")] = None,
    all_engines: Annotated[bool, typer.Option("--all-engines", help="Plan for every engine")] = False,
    recommend: Annotated[
        bool, typer.Option(help="Compare engines, placements and batches on the largest number of nodes")
    ] = PlanRequest.recommend,
    out: OutPath = None,
) -> None:
    """Predict memory, traffic, time and cost of training CONFIG on any number of nodes: see docs/plan.md.

    It runs training steps without their arithmetic, on any machine. With run.device=cpu it predicts memory on the CPU,
    and times only with --calibrate.
    """
    from trainer.config_file import load
    from trainer.plan.planner import make_plan
    from trainer.plan.report import report

    settings = load(config, overrides)
    request = PlanRequest(
        parse_nodes(nodes), gpu, net, gpus_per_node, images_per_gpu, images, price, data_rate, calibrate, all_engines,
        recommend,
    )  # fmt: skip
    report(make_plan(settings, request), settings, out)


def main() -> None:
    """One line and exit code 1 for what a user can mend; TRAINER_TRACEBACK=1 shows where it came from."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("TRAINER_TRACEBACK"):
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
