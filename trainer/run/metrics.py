"""What a run tells: rows to metrics.jsonl, to monitors and to the console."""

import errno
import json
import logging
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from trainer.config import MonitorSettings
from trainer.config_file import flatten
from trainer.run.console import Dashboard
from trainer.run.files import write_atomically
from trainer.run.results import Row, read_rows
from trainer.run.trackers import Tracker, tracker_factories

log = logging.getLogger(__name__)


class Averages:
    """Means of scalars over steps and ranks, kept on the device: nothing waits for it until `pop`."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.steps = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        values = torch.stack([v.float() for v in metrics.values()])
        self.names = list(metrics)
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1

    def pop(self) -> dict[str, float]:
        """The means since the last call, equal on all ranks; waits for the device."""
        assert self.sums is not None
        means = self.sums / self.steps
        dist.all_reduce(means)
        self.sums, self.steps = None, 0
        return dict(zip(self.names, (means / dist.get_world_size()).tolist(), strict=True))


def peak_memory(device: torch.device) -> Row:
    """memory_gib: the most that tensors have taken on the GPU, reserved_gib: that torch has taken for them; without a
    GPU memory_gib is the most that the process has taken.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # Linux counts in KiB


class MetricsLogger:
    """Writes rows, and shows how far the run is: a dashboard on a terminal, plain lines elsewhere.

    start: the step the run continues from. Rows after it are of a run that was cut off, and are dropped.
    active: on rank 0 only; elsewhere nothing is written or shown. evaluated: steps that have an evaluation.
    """

    def __init__(self, folder: Path, start: int, total: int, settings: MonitorSettings, *, active: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.active = active
        shared: list[Any] = [None]
        if active:
            shared = [_keep_rows_until(self.path, start)]
        dist.broadcast_object_list(shared)
        kept: list[Row] = shared[0]
        self.evaluated_steps = {row["step"] for row in kept if "knn" in row}
        self.earlier_seconds = kept[-1]["seconds"] if kept else 0.0
        self.began = time.monotonic()
        self.dashboard: Dashboard | None = None
        self.trackers: dict[str, Tracker] = {}
        if not active:
            return
        for name, opened in tracker_factories(settings, folder, start).items():
            try:
                self.trackers[name] = opened()
            except OSError as error:
                log.warning("no %s: %s", name, error)
        self.console = Console(stderr=False)
        self.start, self.total = start, total
        if self.console.is_terminal:
            self.dashboard = Dashboard(self.console, start, total)

    def __enter__(self) -> "MetricsLogger":
        if self.dashboard:
            self.dashboard.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.dashboard:
            self.dashboard.live.stop()
        for name, tracker in self.trackers.items():
            try:
                tracker.close()
            except OSError as error:
                log.warning("the last rows not written to %s: %s", name, error)

    @property
    def seconds(self) -> float:
        """Time spent on this run, over all its starts."""
        return self.earlier_seconds + time.monotonic() - self.began

    def advance(self, step: int) -> None:
        if self.dashboard:
            self.dashboard.advance(step)

    def print(self, text: str) -> None:
        """A line on the console, above the dashboard if there is one."""
        if self.active:
            with suppress(OSError):  # standard output may be a file on a full disk
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def log(self, row: Row) -> None:
        """Record one row; `step` is its place. What the disk does not take is said, not raised."""
        if not self.active:
            return
        row = {**row, "seconds": round(self.seconds, 3)}
        try:
            _append(self.path, json.dumps(row) + "\n")
        except OSError as error:
            log.warning("metrics of step %d not written: %s", row["step"], error)
        values = {name: value for name, value in flatten(row).items() if name != "step"}
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.add(row["step"], values)
            except OSError as error:
                log.warning("no more rows to %s until the next start: %s", name, error)
                del self.trackers[name]  # TensorBoard's writer does not recover
        self._show(row)

    def _show(self, row: Row) -> None:
        if self.dashboard:
            self.dashboard.show(row)
        if "knn" in row:
            self.print(f"epoch {row['epoch']:g}: kNN {row['knn']:.4f}")
        elif not self.dashboard:
            pretext = f"pretext {row['pretext_top1']:.3f}  " if "pretext_top1" in row else ""
            status = f"loss {row['loss']:.3f}  {pretext}{row['images_per_second']:,.0f} img/s"
            left = (self.total - row["step"]) * row["images"] / row["step"] / row["images_per_second"]
            self.print(f"step {row['step']:,}/{self.total:,}  epoch {row['epoch']:.2f}  {status}  left {_clock(left)}")


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _append(path: Path, line: str) -> None:
    """Add the whole line or, where the disk has no room for it, nothing."""
    content = line.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _keep_rows_until(path: Path, step: int) -> list[Row]:
    """Drop the rows after `step`, and lines cut short, from the file; returns the others."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def set_up_logging(rank: int) -> None:
    """Our own messages to stderr, rank 0's from information on, the others' from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    ours = logging.getLogger("trainer")
    for name in ("trainer", "data", "models", "kernels"):
        ours = logging.getLogger(name)
        ours.handlers = [handler]
        ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        ours.propagate = False
