"""The command line, `python -m trainer VERB`. Each verb imports what it needs, so that --help is quick."""

import gc
import io
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from data.paths import expand_user
from trainer.bench.cli import ConfigPath, OutPath, Overrides, bench_app, scale_app
from trainer.evaluate.registry import EVALUATIONS, Registration
from trainer.ops.ending import Stopped, StopSignals, end_process, exit_code
from trainer.plan.request import PlanRequest, parse_nodes

app = typer.Typer(
    name="python -m trainer",
    help="Adversarial contrastive self-supervised learning of image representations.\n\n"
    "Verbs that train or evaluate also run on several processes: torchrun --nproc-per-node N -m trainer VERB …",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench_app, name="bench")
app.add_typer(scale_app, name="scale")
data_app = typer.Typer(no_args_is_help=True, help="Index, check, shard and view a data set.")
app.add_typer(data_app, name="data")

CORES = len(os.sched_getaffinity(0))
RunPath = Annotated[Path, typer.Argument(help="Run directory, pre-trained or imported", metavar="RUN")]
DataPath = Annotated[str, typer.Argument(help="Images: anything that data.train accepts", metavar="SRC")]
Threads = Annotated[int, typer.Option(help="Number of images to read at a time", min=1)]
NetworkName = Annotated[Literal["student", "teacher"], typer.Option(help="Network of the run to use")]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint, see run.keep_every; the newest if not given")]


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pre-train an encoder. The same command continues a run that was stopped.

    On SIGTERM, SIGUSR1, Ctrl-C, a file `stop` in the run directory, run.max_minutes or shortly before the end of a
    SLURM job, it saves a checkpoint and exits with code 75 (under torchrun with code 0, and writes stopped.json).
    """
    from trainer.config_file import load

    settings = load(config, overrides)
    from trainer.pretrain import pretrain  # only now: a mistake is reported without it

    pretrain(settings)


@app.command()
def replay(run: RunPath) -> None:
    """Repeat the step whose loss or gradient was not finite and report the first modules with non-finite values.

    Needs as many ranks as the run had: torchrun …; TRAINER_DEBUG=1 checks more.
    """
    from trainer.ops.replay import replay

    if text := replay(run):
        print(text)


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="Checkpoint file, or a folder in timm's or transformers' format", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="Run directory to create")],
    overrides: Overrides = None,
    backbone: Annotated[str | None, typer.Option(help="timm's name, such as resnet50, if not in FILE")] = None,
    backbone_args: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Argument for timm's create_model, such as num_heads=12; repeatable"),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Tensors to leave out, such as 'prototypes.*'; repeatable"),
    ] = None,
) -> None:
    """Convert a checkpoint of another program, such as MoCo, DINO, MAE, lightly or timm, to a run directory.

    knn, embed and export then work on it. KEY=VALUE sets its configuration, such as model.small_images=true or
    data.train=…. See docs/ecosystem.md.
    """
    from trainer.interop.import_ import import_weights

    print(import_weights(file, out, backbone, overrides or [], backbone_args, ignore))


@app.command()
def export(
    run: RunPath,
    to: Annotated[
        Literal["timm", "torchvision", "detectron2", "onnx", "huggingface"],
        typer.Option("--format", help="Format"),
    ],
    out: Annotated[Path, typer.Option(help="File to write; for huggingface, a folder")],
    network: NetworkName = "student",
    step: Step = None,
    licence: Annotated[str, typer.Option("--license", help="For the model card, such as apache-2.0")] = "unknown",
) -> None:
    """Write the backbone of a run for timm, torchvision, detectron2, onnxruntime or Hugging Face.

    The default is the student, which AdCo, MoCo, SimCLR and BYOL evaluate; DINO evaluates its teacher. See
    docs/ecosystem.md.
    """
    from trainer.interop.export import export
    from trainer.interop.weights import CheckpointChoice

    if message := export(run, to, out, CheckpointChoice(network, step), licence):
        print(message)


@app.command()
def embed(
    run: RunPath,
    src: DataPath,
    out: Annotated[Path, typer.Option(help="File to write: .parquet, or .npy with names in a .csv")],
    overrides: Overrides = None,
    network: NetworkName = "student",
    step: Step = None,
    points: Annotated[int, typer.Option(help="Number of images on the page; 0 for no page", min=0, max=5000)] = 2000,
) -> None:
    """Write the features of all images of SRC, and a page with a map of them and their nearest neighbours.

    KEY=VALUE sets eval.batch_size, eval.size (pixels), run.device and the like. See docs/ecosystem.md.
    """
    from trainer.evaluate.embed import embed
    from trainer.interop.weights import CheckpointChoice

    if message := embed(run, src, out, CheckpointChoice(network, step), points, overrides or []):
        print(message)


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

        given = overrides or []
        settings = [*given, *(text for text in registration.overrides(seed, fast) if text not in given)]
        run_evaluation(verb, run, settings, folder_name, CheckpointChoice(network, step))


for _verb, _registration in EVALUATIONS.items():
    _add_evaluation(_verb, _registration)


@app.command("evaluate")
def evaluate_own(
    run: RunPath,
    evaluation: Annotated[str, typer.Argument(help="An Evaluator: my_evaluation.py:NAME", metavar="FILE.py:NAME")],
    overrides: Overrides = None,
    folder_name: Annotated[str | None, typer.Option("--name", help="Directory in RUN for the results")] = None,
    network: NetworkName = "student",
    step: Step = None,
) -> None:
    """Evaluate a checkpoint of a run by an evaluation of your own, see docs/extend.md."""
    from trainer.evaluate.run import run_evaluation
    from trainer.interop.weights import CheckpointChoice

    choice = CheckpointChoice(network, step)
    run_evaluation(evaluation, run, overrides or [], folder_name, choice)


@app.command()
def report(run: RunPath, overrides: Overrides = None) -> None:
    """Write RUN/report.html, a page with curves, nearest neighbours and the images nearest to the negatives."""
    from trainer.report.run import write_report

    print(write_report(run, overrides))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="Page to write")] = Path("compare.html"),
) -> None:
    """Compare runs in a table and a page: accuracy by epochs, images seen and time, and the settings that differ."""
    from trainer.report.compare import compare

    compare(runs, out)
    print(out)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file whose needs to check", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    bad_nodes: Annotated[Path | None, typer.Option(help="Under torchrun: file for the names of faulty nodes")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print versions, settings and the end of the log for a bug report")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="With --report: what the program printed, such as a job's log")
    ] = None,
) -> None:
    """Check what this machine has for training, and whether it has what a configuration needs.

    Under torchrun, compare all machines. The exit code is 1 if something is missing, or a machine differs or is slow.
    """
    if report or log:
        from trainer.ops.bug_report import bug_report

        print(bug_report(config, overrides or [], log))
        return
    from trainer.config_file import load
    from trainer.ops.preflight import check_machines

    if not check_machines(load(config, overrides) if config else None, bad_nodes):
        raise typer.Exit(1)


@app.command("config")
def show_config(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file, such as configs/demo.yaml", metavar="CONFIG")
    ] = None,
    overrides: Overrides = None,
    get: Annotated[str | None, typer.Option(help="Print only this value, such as run.dir")] = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes for --ranks-per-node", min=1)] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="Fail if CONFIG cannot train on so many ranks", min=1)
    ] = None,
    explain: Annotated[
        str | None, typer.Option(help="Explain a key or section, such as bank.lr or engine", metavar="KEY")
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Print the page docs/configuration.md")] = False,
) -> None:
    """Print the complete configuration, including the defaults of keys that CONFIG does not set."""
    from trainer.report import config_reference

    print(config_reference.show(config, overrides, get, nodes, ranks_per_node, explain, reference))


@data_app.command("index")
def data_index(
    src: DataPath, out: Annotated[Path, typer.Argument(help="Index to write; data.train accepts it", metavar="OUT.npz")]
) -> None:
    """List the images of a folder or of shards once, so that runs with data.train=OUT.npz need no scan."""
    from data.tools import make_index
    from trainer.run.metrics import set_up_logging

    set_up_logging(0)
    print(make_index(src, out))


@data_app.command("verify")
def data_verify(
    src: DataPath,
    out: Annotated[Path | None, typer.Option(help="Write an index of the readable images to this .npz file")] = None,
    threads: Threads = CORES,
) -> None:
    """Read and decode every image. List the unreadable ones with the reason; the exit code is 1 if there are any."""
    from data.tools import verify
    from trainer.run.metrics import set_up_logging

    set_up_logging(0)
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
    from trainer.run.metrics import set_up_logging

    set_up_logging(0)
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

    settings = load(config, overrides)
    from trainer.plan.planner import make_plan  # only now, as in pretrain
    from trainer.plan.report import report

    request = PlanRequest(
        parse_nodes(nodes), gpu, net, gpus_per_node, images_per_gpu, images, price, data_rate, calibrate, all_engines,
        recommend,
    )  # fmt: skip
    report(make_plan(settings, request), settings, out)


def _expand_home(argument: str) -> str:
    """Expand `~` at the start of an argument or of an option's value, where the shell has left it: --out=~/x."""
    start = option.end() if (option := re.match("--[a-z-]+=(?=~)", argument)) else 0
    return argument[:start] + expand_user(argument[start:])


def main() -> None:
    """Run a verb. User errors end with one line and exit code 1; TRAINER_TRACEBACK=1 shows the traceback.

    SIGTERM and SIGUSR1 end every verb in good order, with the exit code for an early stop.
    """
    # By default the collector looks through the objects of torch and timm again and again while they are imported.
    gc.set_threshold(50_000)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or name that the terminal's encoding lacks
    try:
        with StopSignals() as signals:
            _run_verb(signals)
    except BaseException as error:
        end_process(error)
        raise


def _run_verb(signals: StopSignals) -> None:
    try:
        app([_expand_home(argument) for argument in sys.argv[1:]])
    except (Stopped, ValueError, OSError, RuntimeError) as error:
        # Other ranks that have stopped may be why this one fails, and libraries turn Stopped into errors of their own.
        if isinstance(error, Stopped) or signals.reason:
            print(error if isinstance(error, Stopped) else f"stopped ({signals.reason})", file=sys.stderr)
            sys.exit(exit_code())
        if isinstance(error, RuntimeError) or os.environ.get("TRAINER_TRACEBACK"):
            raise
        print("error: " + re.sub(r"\s*\n\s*", " ", str(error).strip()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
