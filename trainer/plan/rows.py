"""The plan of a run: what each number of nodes takes, and which engine, placement of the bank and batch to choose."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from data.order import steps_per_epoch
from trainer.config import Config
from trainer.plan.hardware import Cluster, make_cluster
from trainer.plan.memory import ENGINES, Counted, Memory, changed, check_ranks, count, name_of, with_engine
from trainer.plan.predict import StepTime, calibration_factors, step_time
from trainer.run.files import read_json

IMAGENET = 1_281_167  # training images
CLOSE = 0.02  # of speed: not worth another engine or placement
ENOUGH = 0.95  # of the best speed: not worth a larger batch


class Case(NamedTuple):
    """images: of a GPU in a step."""

    engine: str
    placement: str
    nodes: int
    images: int


class Row(NamedTuple):
    """What a case takes. sent: bytes of a rank in a step. hours: of the whole training, without evaluation."""

    case: Case
    gpus: int
    memory: Memory
    fits: bool
    step: StepTime
    hours: float

    @property
    def batch(self) -> int:
        return self.case.images * self.gpus

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step.seconds


class Target(NamedTuple):
    """Where and how long. gpu, net: names, see `make_cluster`. images: of the data set. data_rate: images/s that a
    node's loader gives, None: not known. factors: measured over predicted time of each phase.
    """

    gpu: str
    net: str
    cluster: Cluster
    images: int
    data_rate: float | None = None
    factors: dict[str, float] | None = None


class Plan(NamedTuple):
    """left_out: nodes and why. candidates: that were compared for the last number of nodes; best: one of them."""

    target: Target
    rows: list[Row]
    left_out: dict[int, str]
    candidates: list[Row]
    best: Row | None
    timed: bool


def parse_nodes(text: str) -> list[int]:
    """ "1,2,8" as these numbers, "1..16" as the powers of two times 1 up to 16. Raises ValueError for anything else."""
    wrong = f"plan: got --nodes {text}, need numbers such as 1,2,8, or 1..1024"
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(wrong)
    numbers = [int(part) for part in parts]
    if dots:
        if numbers[0] > numbers[1]:
            raise ValueError(wrong)
        return [numbers[0] * 2**i for i in range((numbers[1] // numbers[0]).bit_length())]
    return sorted(set(numbers))


def make_plan(
    config: Config,
    nodes: list[int],
    gpu: str = "a100",
    net: str = "ib-hdr",
    gpus_per_node: int = 8,
    images_per_gpu: int | None = None,
    images: int = IMAGENET,
    data_rate: float | None = None,
    calibrate: Path | None = None,
    all_engines: bool = False,
    recommend: bool = True,
) -> Plan:
    """Rows of the configuration's own engine, or of all; images_per_gpu None: data.batch_size stays as it is.

    Raises ValueError where nothing fits together, for a file to calibrate from that is of something else, and for
    engine.cpu_offload, which takes from one memory to give to another.
    """
    if getattr(config.engine, "cpu_offload", False):
        raise ValueError("plan: engine.cpu_offload moves memory to the host; need it off, both are one here")
    gpu = "cpu" if config.run.device == "cpu" else gpu
    target = Target(gpu, net, make_cluster(gpu, gpus_per_node, net), images, data_rate)
    timed = gpu != "cpu" or calibrate is not None
    cases, left_out = [], {}
    for number in nodes:
        gpus = number * gpus_per_node
        batch = images_per_gpu * gpus if images_per_gpu else config.data.batch_size
        try:
            check_ranks(config, batch, gpus, gpus_per_node)
            steps_per_epoch(images, batch)
        except ValueError as error:
            left_out[number] = str(error)
        else:
            engines = ENGINES if all_engines else (name_of(config.engine),)
            cases += [Case(engine, config.bank.placement, number, batch // gpus) for engine in engines]
    if not cases:
        raise ValueError(next(iter(left_out.values())))
    with Counter(config, gpu, gpus_per_node) as counter:
        if calibrate:
            target = _calibrated(target, config, counter, calibrate)
        rows = _rows(config, target, counter, cases)
        candidates, best = _recommend(config, target, counter, rows[-1].case) if recommend and timed else ([], None)
    return Plan(target, rows, left_out, candidates, best, timed)


class Counter:
    """Counts cases in processes of their own: DeepSpeed keeps its group for the life of a process."""

    def __init__(self, config: Config, gpu: str, per_node: int) -> None:
        self.config, self.gpu, self.per_node = config, gpu, per_node
        self.known: dict[Case, Counted] = {}

    def __enter__(self) -> "Counter":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.plan.memory", "timm"])
        self.pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, max_tasks_per_child=1)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, cases: Iterable[Case], per_node: int | None = None) -> list[Counted]:
        """per_node: GPUs of a node, where these are other nodes than those that are planned for."""
        each, cases = per_node or self.per_node, list(cases)
        groups: dict[tuple[int, bool], list[Case]] = {}  # of one process, as it takes seconds to import DeepSpeed
        for case in dict.fromkeys(cases):
            if per_node or case not in self.known:
                groups.setdefault((case.nodes * each, case.engine.startswith("zero")), []).append(case)
        tasks = {
            self.pool.submit(count, [self._settings(case, gpus) for case in own], gpus, each): own
            for (gpus, _), own in groups.items()
        }
        found: dict[Case, Counted] = {}
        for task in track(tasks, "counting", console=Console(stderr=True), transient=True):
            found |= dict(zip(tasks[task], task.result(), strict=True))
        if per_node is None:
            self.known |= found
            found = self.known
        return [found[case] for case in cases]

    def _settings(self, case: Case, gpus: int) -> Config:
        return with_engine(self.config, case.engine, case.placement, case.images * gpus, self.gpu)


def _rows(config: Config, target: Target, counter: Counter, cases: list[Case]) -> list[Row]:
    rows = []
    for case, counted in zip(cases, counter(cases), strict=True):
        gpus = case.nodes * target.cluster.gpus_per_node
        each = case.images * target.cluster.gpus_per_node
        step = step_time(counted.events, target.cluster, gpus, each, target.factors, target.data_rate)
        steps = steps_per_epoch(target.images, case.images * gpus) * config.run.epochs
        fits = counted.memory.fits(target.cluster.gpu.memory)
        rows.append(Row(case, gpus, counted.memory, fits, step, steps * step.seconds / 3600))
    return rows


def _recommend(config: Config, target: Target, counter: Counter, case: Case) -> tuple[list[Row], Row | None]:
    """Candidates for a number of nodes, and the best of them; None if none fits.

    Every engine; every placement under the own engine; other batches with the best of both, of which the smallest that
    is fast enough is taken.
    """
    own, per_node = case._replace(engine=name_of(config.engine)), target.cluster.gpus_per_node
    gpus = own.nodes * per_node
    found = _rows(
        config, target, counter, [own._replace(engine=engine) for engine in sorted(ENGINES, key=own.engine.__ne__)]
    )
    engine = _fastest(found).case.engine
    cases = []
    for placement in ("replicated", "sharded", "node") if config.method.negatives != "none" else ():
        try:
            check_ranks(changed(config, {"bank": {"placement": placement}}), own.images * gpus, gpus, per_node)
        except ValueError:
            continue
        if placement != own.placement and (placement != "node" or own.nodes > 1):
            cases.append(own._replace(placement=placement))
    placed = _rows(config, target, counter, cases)
    best = _fastest([found[0], *placed]).case._replace(engine=engine)
    found += placed
    fits = any(row.fits for row in found)
    sizes = [own.images, *(own.images * 2**i if fits else own.images // 2**i for i in (1, 2, 3))]
    cases = [best._replace(images=n) for n in sizes if 2 * config.optim.accumulate <= n <= target.images // gpus]
    batches = _rows(config, target, counter, cases)
    known = {row.case for row in found}
    found += [row for row in batches if row.case not in known]
    fitting = [row for row in batches if row.fits]
    most = max((row.images_per_second for row in fitting), default=0.0)
    enough = [row for row in fitting if row.images_per_second >= ENOUGH * most]
    return found, min(enough, key=lambda row: row.batch, default=None)


def _fastest(rows: list[Row]) -> Row:
    """The first, unless another is faster by more than CLOSE; those that do not fit only if none does."""
    rows = [row for row in rows if row.fits] or rows
    best = min(rows, key=lambda row: row.step.seconds)
    return rows[0] if rows[0].step.seconds <= (1 + CLOSE) * best.step.seconds else best


def _calibrated(target: Target, config: Config, counter: Counter, path: Path) -> Target:
    """With the factors of a file of `bench throughput`, and its loader's speed. Raises ValueError where it is none,
    or of another network, method, type or GPU."""
    result = read_json(path)
    if "modes" not in result:
        raise ValueError(f"plan: --calibrate {path}: not a file of bench throughput --out")
    settings = with_engine(config, name_of(config.engine), config.bank.placement, config.data.batch_size, counter.gpu)
    types = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    wanted: dict[str, Any] = {
        "backbone": config.model.backbone,
        "method": config.method.name,
        "views": [view.size for view in config.data.views],
        "negatives": config.bank.size,
        "placement": config.bank.placement,
        "engine": config.engine.kind,
        "precision": types[settings.run.precision],
    }
    for key, value in wanted.items():
        if result[key] != value:
            raise ValueError(f"plan: --calibrate {path}: it has {key} {result[key]}, the configuration {value}")
    chip = target.cluster.gpu.name.split()[0]
    if chip not in result["device"]:
        raise ValueError(f"plan: --calibrate {path}: measured on {result['device']}, planned for {chip}")
    modes, ranks = result["modes"], result["ranks"]
    mode = modes.get("synthetic") or modes.get("full")
    factors = None
    if mode:
        per_node = ranks // result["nodes"]
        images = result["batch_size"] // ranks
        case = Case(name_of(config.engine), config.bank.placement, result["nodes"], images)
        (counted,) = counter([case], per_node)
        cluster = target.cluster._replace(gpus_per_node=per_node)
        step = step_time(counted.events, cluster, ranks, images * per_node)
        factors = calibration_factors(step, {name: phase["seconds"] for name, phase in mode["phases"].items()})
    rate = modes["data"]["images_per_second"] / result["nodes"] if "data" in modes else None
    return target._replace(factors=factors, data_rate=target.data_rate or rate)
