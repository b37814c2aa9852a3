"""Trackers that receive the rows of metrics.jsonl as well: TensorBoard, Weights & Biases and Prometheus.

A tracker never ends a run. It raises OSError if the disk or the network fails; the metrics logger reports that and
continues without it.
"""

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from data.extras import optional_import
from trainer.config import MonitorSettings
from trainer.run.directory import read_config
from trainer.run.files import write_atomically

log = logging.getLogger(__name__)

FINISH_SECONDS = 30.0  # for which the end of a run waits for W&B; without a network W&B would wait for ever


class Tracker(Protocol):
    """Receives the numbers of each row."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Record the values of a row, by dotted name. Raises OSError."""

    def close(self) -> None:
        """Write what is still buffered. Raises OSError."""


class TensorBoard:
    """Writes TensorBoard event files, and hides steps after `start` of an earlier process; None hides none."""

    def __init__(self, folder: Path, start: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _report_thread_error
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=None if start is None else start + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class WeightsAndBiases:
    """Logs all starts of a run, and its evaluations, to one W&B run.

    Steps that a resumed run repeats appear twice with equal values.

    Args:
        folder: The run directory.
        project: The project of W&B.
        evaluation: The directory of an evaluation in the run, whose name precedes those of its values; "" for none.
    """

    def __init__(self, folder: Path, project: str, evaluation: str = "") -> None:
        with optional_import("wandb", "monitor.wandb"):
            import wandb

        self.prefix = f"{evaluation}/" if evaluation else ""
        (folder / "wandb").mkdir(exist_ok=True)
        id_file = folder / "wandb" / "id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex)
        run_id = id_file.read_text(encoding="utf-8")
        while list((folder / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
            time.sleep(0.1)  # wandb loses the rows of a process whose directory, named by second and id, exists already
        settings = wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)
        with _wandb_errors_as_os_errors():
            self.run = wandb.init(
                project=project,
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=read_config(folder).model_dump(mode="json"),
                settings=settings,
            )
            self.run.define_metric(f"{self.prefix}*", step_metric=f"{self.prefix}step")

    def add(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        named = {"step": float(step)} | {name.replace(".", "/"): value for name, value in values.items()}
        with _wandb_errors_as_os_errors():
            self.run.log({self.prefix + name: value for name, value in named.items()})

    def close(self) -> None:
        """See `Tracker`. Rows that were not sent in time stay in the run directory, for `wandb sync`."""
        with _wandb_errors_as_os_errors():
            self.run.finish()


@contextmanager
def _wandb_errors_as_os_errors() -> Iterator[None]:
    """Raise OSError for W&B's own errors: no network, no API key, or the end of W&B's process.

    They have no common base class. Other errors pass: an OSError of the connection to W&B's process, or a fault here.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error


class Prometheus:
    """Writes gauges such as `adco_loss{run="…"}` to a text file for node_exporter, replacing it atomically."""

    def __init__(self, path: Path, run: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self.path, self.run, self.registry = path, run, CollectorRegistry()
        self.gauges: dict[str, Gauge] = {}

    def add(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        from prometheus_client import Gauge, write_to_textfile

        for name, value in ({"step": step} | values).items():
            if name not in self.gauges:
                gauge = "adco_" + re.sub(r"\W", "_", name)
                self.gauges[name] = Gauge(gauge, name, ["run"], registry=self.registry)
            self.gauges[name].labels(run=self.run).set(value)
        write_to_textfile(str(self.path), self.registry)

    def close(self) -> None:
        """Keep the file: the last values stay readable after the run."""


def tracker_factories(
    settings: MonitorSettings, run: Path, folder: Path, start: int | None
) -> dict[str, Callable[[], Tracker]]:
    """Return a constructor for each tracker that the settings enable, by display name. Constructors raise OSError.

    Args:
        settings: The trackers.
        run: The run directory.
        folder: The directory of what is logged: `run`, or that of an evaluation in it.
        start: Step from which the log continues; None for what is not a continued log.
    """
    evaluation = "" if folder == run else str(folder.relative_to(run))
    factories: dict[str, Callable[[], Tracker]] = {}
    if settings.tensorboard:
        factories["TensorBoard"] = lambda: TensorBoard(folder, start)
    if project := settings.wandb:
        factories["Weights & Biases"] = lambda: WeightsAndBiases(run, project, evaluation)
    if settings.prometheus:
        path = Path(settings.prometheus)
        if evaluation:  # beside the file of the run, which may still be in training
            path = path.with_name(f"{path.stem}-{evaluation.replace('/', '-')}{path.suffix}")
        factories["Prometheus"] = lambda: Prometheus(path, str(folder))
    return factories


def open_trackers(settings: MonitorSettings, run: Path, folder: Path, start: int | None) -> dict[str, Tracker]:
    """Return the trackers that can be used, by display name. Logs a warning for the others. See `tracker_factories`."""
    trackers = {}
    for name, make_tracker in tracker_factories(settings, run, folder, start).items():
        try:
            trackers[name] = make_tracker()
        except OSError as error:
            log.warning("%s is not available: %s", name, error)
    return trackers


def close_trackers(trackers: dict[str, Tracker]) -> None:
    """Close trackers. Logs a warning where that fails."""
    for name, tracker in trackers.items():
        try:
            tracker.close()
        except OSError as error:
            log.warning("the last rows were not written to %s: %s", name, error)


def log_results(settings: MonitorSettings, run: Path, folder: Path, step: int, results: dict[str, Any]) -> None:
    """Send the numbers among the results of an evaluation to the trackers.

    Args:
        settings: The trackers.
        run: The run directory.
        folder: The directory of the evaluation.
        step: Step of the evaluated checkpoint.
        results: The results; only numbers are sent.
    """
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float)}
    trackers = open_trackers(settings, run, folder, None)
    for name, tracker in trackers.items():
        try:
            tracker.add(step, {f"results.{key}": float(value) for key, value in numbers.items()})
        except OSError as error:
            log.warning("%s does not get the results of %s: %s", name, folder, error)
    close_trackers(trackers)


_default_thread_hook = threading.excepthook


def _report_thread_error(failure: threading.ExceptHookArgs) -> None:
    """Report the error of a thread, but not an OSError of TensorBoard's, which it raises again at the next call."""
    of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
    if not (of_tensorboard and isinstance(failure.exc_value, OSError)):
        _default_thread_hook(failure)
