"""Trackers that receive the rows of metrics.jsonl as well: TensorBoard, Weights & Biases and Prometheus.

A tracker never ends a run. It raises OSError if the disk or the network fails; the metrics logger reports that and
continues without it.
"""

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from data.extras import optional_import
from trainer.config import MonitorSettings
from trainer.run.directory import read_config
from trainer.run.files import write_atomically


class Tracker(Protocol):
    """Receives the numbers of each row."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Record the values of a row, by dotted name. Raises OSError."""

    def close(self) -> None:
        """Write what is still buffered. Raises OSError."""


class TensorBoard:
    """Writes TensorBoard event files, and hides steps after `start` that an earlier process wrote."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class WeightsAndBiases:
    """Logs all starts of a run to one W&B run. Steps that a resumed run repeats appear twice with equal values."""

    def __init__(self, folder: Path, project: str) -> None:
        with optional_import("wandb", "monitor.wandb"):
            import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        id_file = folder / "wandb" / "id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex)
        try:
            self.run = wandb.init(
                project=project,
                name=folder.name,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                dir=folder,
                config=read_config(folder).model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:  # no network or no API key
            raise OSError(" ".join(str(error).split())) from error
        self.run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self.run.log({"step": step} | {name.replace(".", "/"): value for name, value in values.items()})

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


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


def tracker_factories(settings: MonitorSettings, folder: Path, start: int) -> dict[str, Callable[[], Tracker]]:
    """Return a constructor for each tracker that the settings enable, by display name. Constructors raise OSError."""
    factories: dict[str, Callable[[], Tracker]] = {}
    if settings.tensorboard:
        factories["TensorBoard"] = lambda: TensorBoard(folder, start)
    if project := settings.wandb:
        factories["Weights & Biases"] = lambda: WeightsAndBiases(folder, project)
    if path := settings.prometheus:
        factories["Prometheus"] = lambda: Prometheus(Path(path), str(folder))
    return factories
