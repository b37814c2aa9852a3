"""Where the rows of the log go beside metrics.jsonl: TensorBoard, Weights & Biases, Prometheus.

A monitor never stops a run: what disk or network refuses is an OSError of it, which the recorder tells and goes on.
"""

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trainer.config import MonitorSettings
from trainer.run.directory import read_config, write_atomically


class Monitor(Protocol):
    def add(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a row, by dotted name. Raises OSError."""

    def close(self) -> None:
        """Raises OSError."""


class TensorBoard:
    """start: later steps of earlier starts are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run over all starts. Charts are over `step`: rows that a restart repeats are there twice, and agree."""

    def __init__(self, folder: Path, project: str) -> None:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)
        name = folder / "wandb" / "id"
        if not name.exists():
            write_atomically(name, uuid.uuid4().hex)
        try:
            self.run = wandb.init(
                project=project,
                name=folder.name,
                id=name.read_text(encoding="utf-8"),
                resume="allow",
                dir=folder,
                config=read_config(folder).model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:  # no network, no key
            raise OSError(" ".join(str(error).split())) from error
        self.run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step} | {name.replace(".", "/"): value for name, value in values.items()})

    def close(self) -> None:
        self.run.finish()


class Prometheus:
    """Gauges `adco_loss{run="…"}` and so on, in Prometheus' text format. A scraper never sees half a file."""

    def __init__(self, path: Path, run: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self.path, self.run, self.registry = path, run, CollectorRegistry()
        self.gauges: dict[str, Gauge] = {}

    def add(self, step: int, values: dict[str, float]) -> None:
        from prometheus_client import Gauge, write_to_textfile

        for name, value in ({"step": step} | values).items():
            if name not in self.gauges:
                gauge = "adco_" + re.sub(r"\W", "_", name)
                self.gauges[name] = Gauge(gauge, name, ["run"], registry=self.registry)
            self.gauges[name].labels(run=self.run).set(value)
        write_to_textfile(str(self.path), self.registry)

    def close(self) -> None:
        """The last values stay, for those who look later."""


def openers(settings: MonitorSettings, folder: Path, start: int) -> dict[str, Callable[[], Monitor]]:
    """What the settings ask for, by name, each to be opened. Opening raises OSError."""
    found: dict[str, Callable[[], Monitor]] = {}
    if settings.tensorboard:
        found["TensorBoard"] = lambda: TensorBoard(folder, start)
    if project := settings.wandb:
        found["Weights & Biases"] = lambda: WeightsAndBiases(folder, project)
    if path := settings.prometheus:
        found["Prometheus"] = lambda: Prometheus(Path(path), str(folder))
    return found
