"""The training loop of pre-training, linear evaluation and fine-tuning: fetch, step, log, save, evaluate, stop."""

import gc
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from data.batch import Batch
from trainer.config import MonitorSettings, Run
from trainer.distributed import RankInfo
from trainer.engines.finite import NotFinite, StepResult
from trainer.ops.stop import StopHandler, deadline
from trainer.ops.watchdog import Watchdog
from trainer.plan.hardware import peak_flops
from trainer.run.checkpoint import Saver
from trainer.run.metrics import Averages, MetricsLogger, peak_memory
from trainer.run.phases import PhaseTimer, find_straggler, gather_phase_times, host_names, phase_metrics, trace_steps
from trainer.run.results import Row
from trainer.run.unreadable import UnreadableImages

log = logging.getLogger(__name__)

COLLECT_EVERY = 50  # steps between collections of garbage


class Task(Protocol):
    """A model that the loop trains. All methods are called by all ranks.

    Attributes:
        phases: Measures the phases of a step.
        flops: Floating-point operations of one step over all ranks; 0 if they are not counted.
    """

    phases: PhaseTimer
    flops: float

    def step(self, batch: Batch, step: int) -> StepResult:
        """Train on one batch, without waiting for the device; steps count from 1."""

    def log_values(self, step: int, averages: dict[str, float]) -> dict[str, float]:
        """Return further values for the row of the log after `step`, which has the averages of `step`'s metrics."""

    def describe_failure(self, error: NotFinite, batch: Batch, step: int) -> str:
        """Keep what is needed to repeat a step that was not finite, and say what the user can do.

        The model's state is still that before the step. Later steps may have run, but changed nothing.
        """

    def state(self, step: int) -> dict[str, Any]:
        """Return the tensors of a checkpoint after `step` steps."""

    def evaluate(self, step: int) -> Row:
        """Evaluate the model after `step` steps and return named numbers for the log."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of `train`: folders, length, intervals.

    Attributes:
        run_folder: The run directory, to whose W&B run the log belongs.
        folder: Receives metrics and checkpoints.
        stop_folder: Folder in which a file named `stop` ends training.
        process_start: When the process started, in seconds since the epoch; `run.max_minutes` counts from there.
        steps: Total number of steps.
        steps_per_epoch: Steps in an epoch.
        batch_size: Images per step over all ranks.
        num_images: Size of the training set.
        max_unreadable: Largest accepted share of unreadable images.
        save_every: Steps between checkpoints.
        keep: Number of newest checkpoints to keep.
        keep_every: Steps between checkpoints that are never deleted; 0 for none.
        evaluate_every: Steps between evaluations; 0 evaluates at the start and end only, None never.
        run: Log interval, timeouts, time limit and profiling.
        trackers: Destinations of the log besides metrics.jsonl.
    """

    run_folder: Path
    folder: Path
    stop_folder: Path
    process_start: float
    steps: int
    steps_per_epoch: int
    batch_size: int
    num_images: int
    max_unreadable: float
    save_every: int
    keep: int
    keep_every: int
    evaluate_every: int | None
    run: Run
    trackers: MonitorSettings

    def is_kept(self, step: int) -> bool:
        """Return whether the checkpoint of `step` is never deleted."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def log_due(self, step: int) -> bool:
        """Return whether a row is logged; also at checkpoints, so that a resumed run averages over the same steps.

        A stop is logged in any case.
        """
        return step % self.run.log_every == 0 or self.save_due(step)

    def save_due(self, step: int) -> bool:
        """Return whether a checkpoint is saved after `step`."""
        return step % self.save_every == 0 or step == self.steps or self.is_kept(step)

    def evaluation_due(self, step: int) -> bool:
        """Return whether the model is evaluated after `step`."""
        every = self.evaluate_every
        return every is not None and (step in (0, self.steps) or (every > 0 and step % every == 0))

    def position(self, step: int) -> Row:
        """Return the columns of the log that say how far training is."""
        return {"step": step, "epoch": step / self.steps_per_epoch, "images": step * self.batch_size}


def train(task: Task, batches: Iterator[Batch], start: int, settings: LoopSettings, rank_info: RankInfo) -> float:
    """Train `task` from step `start` to the end. Called by all ranks.

    Args:
        task: What is trained; its state is that after `start` steps.
        batches: This rank's batches of steps `start` + 1 to `settings.steps`.
        start: Number of steps that a checkpoint has already done.
        settings: Where and how long.
        rank_info: This process among all ranks.

    Returns:
        Seconds spent on this training over all starts.

    Raises:
        trainer.ops.stop.Stopped: The user, SLURM or a time limit asked for an early end; a checkpoint is saved.
        ValueError: A loss or gradient is not finite, too many images are unreadable, or the last checkpoint is not
            saved; on all ranks.
    """
    run = settings.run
    averages, unreadable = Averages(), UnreadableImages(settings.folder, rank_info.rank)
    throughput = Throughput(task, settings.batch_size, start, rank_info)
    unchecked: deque[tuple[int, Batch, Callable[[], None]]] = deque()  # steps that may have failed, with their batches
    with (
        Watchdog(settings.folder, rank_info.rank) as watchdog,  # first, so that it also watches the end of the others
        StopHandler(settings.stop_folder, deadline(run.max_minutes, settings.process_start)) as stop,
        MetricsLogger(
            settings.folder,
            start,
            settings.steps,
            settings.trackers,
            active=rank_info.rank == 0,
            run=settings.run_folder,
        ) as metrics,
        Saver(settings.folder / "checkpoints", settings.keep, settings.is_kept, start) as saver,
        watchdog.ending(),
        trace_steps(settings.folder / "trace.json.gz", run.profile if rank_info.rank == 0 else 0) as tracer,
        no_automatic_garbage_collection(),
    ):

        def evaluate(step: int) -> None:
            if settings.evaluation_due(step) and step not in metrics.evaluated_steps:
                metrics.print(f"epoch {step / settings.steps_per_epoch:g}: evaluating")
                metrics.log({**settings.position(step), **task.evaluate(step)})

        def check(newest: int) -> None:
            """Check all steps but the `newest`, on which the device may still work while the host goes on."""
            while len(unchecked) > newest:
                step, batch, check_step = unchecked.popleft()
                try:
                    check_step()
                except NotFinite as error:
                    watchdog.expect(f"the dump of step {step}", run.long_timeout)
                    advice = task.describe_failure(error, batch, step)
                    raise ValueError(f"step {step}: {error}; checkpoints stay as they are; {advice}") from error

        watchdog.expect(f"the evaluation of step {start}", run.long_timeout)
        evaluate(start)
        for step in range(start + 1, settings.steps + 1):
            watchdog.expect(f"step {step}", run.long_timeout if step == start + 1 else run.step_timeout)
            with throughput.timed():
                with task.phases("data"):
                    batch = next(batches)
                unreadable.add(batch.unreadable)
                result = task.step(batch, step)
                averages.add(result.metrics)
                unchecked.append((step, batch, result.check))
                metrics.advance(step)
                if tracer:
                    tracer.step()
                stopping = stop.should_stop()
                logs = settings.log_due(step) or stopping  # what is not logged before a stop is lost
                check(newest=0 if logs else 1)
                values = averages.pop() if logs else None  # waits for the device
            if values is not None:
                if not all(map(math.isfinite, values.values())):
                    raise ValueError(
                        f"step {step}: not finite: {values}; checkpoints stay as they are; "
                        "a lower learning rate may help"
                    )
                values |= task.log_values(step, values) | throughput.take(step) | peak_memory(rank_info.device)
                metrics.log({**settings.position(step), **values, "unreadable": unreadable.total()})
                seen = min((step - start) * settings.batch_size, settings.num_images)
                if not stopping or step == settings.steps:  # a stop saves first
                    unreadable.check_limit(seen, settings.max_unreadable)

            watchdog.expect(f"saving or evaluating after step {step}", run.long_timeout)
            if settings.save_due(step) or settings.evaluation_due(step) or stopping:
                check(newest=0)
            if settings.save_due(step) or stopping:
                with task.phases("save"):
                    saver.start(step, task.state(step))
            if stopping and step < settings.steps:
                saver.wait()
                stop.raise_stopped(step, saver.error)
            evaluate(step)
            if step % COLLECT_EVERY == 0:
                gc.collect()
        if not saver.wait():
            raise ValueError(f"{saver.error}. The same command repeats only the steps after the newest checkpoint")
        return metrics.seconds


@contextmanager
def no_automatic_garbage_collection() -> Iterator[None]:
    """Leave the collection of reference cycles to the `with` block, and never search what exists before it.

    Python would search at any allocation, on another rank at another step, while the other ranks wait for this one.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Throughput:
    """Measures images per second, the time of each phase and the achieved FLOP/s between two rows of the log.

    Time spent on logging, saving and evaluating does not count.
    """

    def __init__(self, task: Task, batch_size: int, start: int, rank_info: RankInfo) -> None:
        """Starts counting after step `start`. Called by all ranks."""
        self.task, self.batch_size, self.rank_info = task, batch_size, rank_info
        self.hosts = host_names()
        self.last_step, self.seconds, self.began = start, 0.0, 0.0

    def timed(self) -> "Throughput":
        """Return the context manager that surrounds each step."""
        return self

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.began

    def take(self, step: int) -> Row:
        """Return the columns of the log since the last call, and warn about a rank that slows down the others."""
        steps = step - self.last_step
        phases = gather_phase_times(self.task.phases.pop(), steps)
        if self.rank_info.rank == 0 and (late := find_straggler(phases, self.hosts)):
            log.warning("%s", late)
        row: Row = {
            "images_per_second": steps * self.batch_size / self.seconds,
            "data_wait": steps * phases["data"].mean / self.seconds,
        }
        if self.task.flops:
            achieved = steps * self.task.flops / self.seconds / self.rank_info.world_size
            row["teraflops"] = achieved / 1e12
            if rated := peak_flops(self.rank_info.device):
                row["mfu"] = achieved / rated
        self.last_step, self.seconds = step, 0.0
        return {**row, "phases": phase_metrics(phases)}


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU with its number of threads."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
