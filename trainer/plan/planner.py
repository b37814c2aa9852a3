"""Plans a training: what each number of nodes takes, and which engine, placement of the bank and batch to choose."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from data.order import steps_per_epoch
from data.processes import fork_server
from trainer.config import Config
from trainer.engines import ddp
from trainer.plan.calibrate import Calibration, read_calibration
from trainer.plan.cases import ENGINES, PlanCase, case_config, check_ranks, engine_name, replaced
from trainer.plan.dry_run import DryRun, RankMemory, dry_run
from trainer.plan.fusion import fuse
from trainer.plan.hardware import Cluster, make_cluster
from trainer.plan.predict import StepTime, step_time
from trainer.plan.request import PlanRequest
from trainer.plan.trace import Event, OperatorEvent

SPEED_TOLERANCE = 0.02  # another engine or placement must be faster than the configuration's by more than this
BATCH_TOLERANCE = 0.05  # the smallest batch is recommended whose speed is within this of the best


class PlanRow(NamedTuple):
    """The prediction for a case: a rank's memory, a step's time, and hours of the training without evaluation."""

    case: PlanCase
    gpus: int
    memory: RankMemory
    fits: bool
    step: StepTime
    hours: float

    @property
    def batch(self) -> int:
        """Images of all GPUs in a step."""
        return self.case.images * self.gpus

    @property
    def images_per_second(self) -> float:
        """Images/s of all GPUs."""
        return self.batch / self.step.seconds


class Plan(NamedTuple):
    """The plan of a training.

    Attributes:
        rows: One row for each number of nodes and engine.
        skipped: Reasons by number of nodes, for those that the configuration cannot train on.
        candidates: Rows that were compared on the largest number of nodes.
        best: The recommended candidate; None if none fits or nothing was compared.
        timed: Whether times are predicted, which on a CPU needs a calibration.
    """

    request: PlanRequest
    cluster: Cluster
    calibration: Calibration
    rows: list[PlanRow]
    skipped: dict[int, str]
    candidates: list[PlanRow]
    best: PlanRow | None
    timed: bool


def make_plan(config: Config, request: PlanRequest) -> Plan:
    """Plan the training of a configuration.

    Raises:
        ValueError: The configuration fits none of the numbers of nodes, the calibration is of something else, or
            engine.cpu_offload is on: the dry run cannot tell the GPU's memory from the host's.
    """
    if getattr(config.engine, "cpu_offload", False):
        raise ValueError("plan: engine.cpu_offload=true cannot be planned, as it moves memory to the host; need false")
    if config.run.device == "cpu":
        request = replace(request, gpu="cpu")
    cluster = make_cluster(request.gpu, request.gpus_per_node, request.net)
    timed = request.gpu != "cpu" or request.calibrate is not None
    engines = ENGINES if request.all_engines else (engine_name(config.engine),)
    cases: list[PlanCase] = []
    skipped: dict[int, str] = {}
    for nodes in request.nodes:
        gpus = nodes * request.gpus_per_node
        batch = request.images_per_gpu * gpus if request.images_per_gpu else config.data.batch_size
        try:
            check_ranks(config, batch, gpus, request.gpus_per_node)
            steps_per_epoch(request.images, batch)
        except ValueError as error:
            skipped[nodes] = str(error)
        else:
            cases += [PlanCase(engine, config.bank.placement, nodes, batch // gpus) for engine in engines]
    if not cases:
        raise ValueError(next(iter(skipped.values())))
    with DryRuns(config, request.gpu) as dry_runs:
        calibration = Calibration(None, request.data_rate)
        if request.calibrate:
            calibration = _calibrate(config, request, cluster, dry_runs)
        planner = _Planner(config, request.images, cluster, calibration, dry_runs)
        rows = planner.rows(cases)
        candidates, best = planner.recommend(rows[-1].case) if request.recommend and timed else ([], None)
    return Plan(request, cluster, calibration, rows, skipped, candidates, best, timed)


class DryRuns:
    """Dry runs of cases, each made once, in processes of their own.

    DeepSpeed keeps its process group for the life of a process.
    """

    def __init__(self, config: Config, gpu: str) -> None:
        self.config, self.gpu = config, gpu
        self.done: dict[tuple[PlanCase, int], DryRun] = {}

    def __enter__(self) -> "DryRuns":
        context = fork_server(["trainer.plan.dry_run", "timm"])
        self.pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, max_tasks_per_child=1)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, cases: Sequence[PlanCase], gpus_per_node: int) -> list[DryRun]:
        """Return the dry run of each case, on nodes of so many GPUs."""
        groups: dict[tuple[int, bool], list[PlanCase]] = {}  # cases of one process, as importing DeepSpeed is slow
        for case in dict.fromkeys(cases):
            if (case, gpus_per_node) not in self.done:
                groups.setdefault((case.nodes * gpus_per_node, case.engine.startswith("zero")), []).append(case)
        tasks = {
            self.pool.submit(dry_run, [self._config(case, gpus) for case in group], gpus, gpus_per_node): group
            for (gpus, _), group in groups.items()
        }
        for task in track(tasks, "dry runs", console=Console(stderr=True), transient=True):
            for case, result in zip(tasks[task], task.result(), strict=True):
                self.done[case, gpus_per_node] = result
        return [self.done[case, gpus_per_node] for case in cases]

    def _config(self, case: PlanCase, gpus: int) -> Config:
        return case_config(self.config, case.engine, case.placement, case.images * gpus, self.gpu)


def _calibrate(config: Config, request: PlanRequest, cluster: Cluster, dry_runs: DryRuns) -> Calibration:
    """Read the request's calibration, with the prediction for the ranks and the batch of its measurement."""
    assert request.calibrate

    def predict(nodes: int, gpus_per_node: int, images: int) -> StepTime:
        case = PlanCase(engine_name(config.engine), config.bank.placement, nodes, images)
        (own_run,) = dry_runs.run([case], gpus_per_node)
        measured_on = cluster._replace(gpus_per_node=gpus_per_node)
        events = _as_launched(own_run.events, config, case.engine)
        return step_time(events, measured_on, nodes * gpus_per_node, images * gpus_per_node)

    batch_size = config.data.batch_size
    own = case_config(config, engine_name(config.engine), config.bank.placement, batch_size, request.gpu)
    calibration = read_calibration(request.calibrate, own, cluster.gpu, predict)
    return calibration._replace(data_rate=request.data_rate or calibration.data_rate)


class _Planner(NamedTuple):
    """Predicts rows and compares them; `images` is the size of the data set."""

    config: Config
    images: int
    cluster: Cluster
    calibration: Calibration
    dry_runs: DryRuns

    def rows(self, cases: list[PlanCase]) -> list[PlanRow]:
        """Predict each case."""
        rows, per_node = [], self.cluster.gpus_per_node
        for case, run in zip(cases, self.dry_runs.run(cases, per_node), strict=True):
            gpus = case.nodes * per_node
            step = step_time(
                _as_launched(run.events, self.config, case.engine),
                self.cluster,
                gpus,
                case.images * per_node,
                *self.calibration,
            )
            steps = steps_per_epoch(self.images, case.images * gpus) * self.config.run.epochs
            fits = run.memory.fits(self.cluster.gpu.memory)
            rows.append(PlanRow(case, gpus, run.memory, fits, step, steps * step.seconds / 3600))
        return rows

    def recommend(self, case: PlanCase) -> tuple[list[PlanRow], PlanRow | None]:
        """Compare every engine, then every placement, then other batches with the best of both.

        Returns:
            All candidates, and the smallest batch that is fast enough; None if none fits.
        """
        own = case._replace(engine=engine_name(self.config.engine))
        candidates = self.rows([own._replace(engine=engine) for engine in sorted(ENGINES, key=own.engine.__ne__)])
        engine = _fastest(candidates).case.engine
        placements = (
            self.rows(self._other_placements(own)) if self.config.method.num_negatives(self.config.bank) else []
        )
        best = _fastest([candidates[0], *placements]).case._replace(engine=engine)
        candidates += placements
        batches = self.rows(self._other_batches(best, own.images, larger=any(row.fits for row in candidates)))
        known = {row.case for row in candidates}
        candidates += [row for row in batches if row.case not in known]
        fitting = [row for row in batches if row.fits]
        most = max((row.images_per_second for row in fitting), default=0.0)
        fast = [row for row in fitting if row.images_per_second >= (1 - BATCH_TOLERANCE) * most]
        return candidates, min(fast, key=lambda row: row.batch, default=None)

    def _other_placements(self, own: PlanCase) -> list[PlanCase]:
        per_node, cases = self.cluster.gpus_per_node, []
        gpus = own.nodes * per_node
        for placement in ("replicated", "sharded", "node"):
            if placement == own.placement or (placement == "node" and own.nodes == 1):
                continue
            try:
                check_ranks(
                    replaced(self.config, {"bank": {"placement": placement}}), own.images * gpus, gpus, per_node
                )
            except ValueError:
                continue
            cases.append(own._replace(placement=placement))
        return cases

    def _other_batches(self, case: PlanCase, images: int, larger: bool) -> list[PlanCase]:
        """Return the case with the given images per GPU, and with 2, 4 and 8 times as many or as few."""
        sizes = [images, *(images * 2**i if larger else images // 2**i for i in (1, 2, 3))]
        gpus, cases = case.nodes * self.cluster.gpus_per_node, []
        for size in sizes:
            if 0 < size <= self.images // gpus:
                try:
                    check_ranks(self.config, size * gpus, gpus, self.cluster.gpus_per_node)
                except ValueError:  # a queue must hold a batch's keys, for example
                    continue
                cases.append(case._replace(images=size))
        return cases


def _as_launched(events: list[Event], config: Config, engine: str) -> list[Event]:
    """Return the events of an engine's step with the encoders compiled and the step replayed, where asked for.

    The configuration's `engine.compile` is that of all engines, its `engine.cuda_graph` that of DDP.
    """
    if config.run.device == "cpu":
        return events
    if config.engine.compile == "encoder" and engine in ("ddp", "zero1", "zero2"):
        events = fuse(events)
    if isinstance(config.engine, ddp.Settings) and config.engine.cuda_graph and engine == "ddp":
        events = [event._replace(replayed=True) if isinstance(event, OperatorEvent) else event for event in events]
    return events


def _fastest(rows: list[PlanRow]) -> PlanRow:
    """Return the first row unless another is clearly faster; rows that do not fit count only if none fits."""
    rows = [row for row in rows if row.fits] or rows
    best = min(rows, key=lambda row: row.step.seconds)
    return rows[0] if rows[0].step.seconds <= (1 + SPEED_TOLERANCE) * best.step.seconds else best
