"""Metrics of a run: averages over steps and ranks, written to metrics.jsonl, to trackers and to the console."""

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
from typing import TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from trainer.config import MonitorSettings
from trainer.config_file import flatten
from trainer.run.console import Dashboard
from trainer.run.files import write_atomically
from trainer.run.results import Row, more_knn, read_rows
from trainer.run.trackers import Tracker, close_trackers, open_trackers

log = logging.getLogger(__name__)


class Averages:
    """Averages scalar metrics over steps and ranks. Sums stay on the device, so that only `pop` waits for it."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.steps = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the scalars of one step."""
        values = torch.stack([v.float() for v in metrics.values()])
        self.names = list(metrics)
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1

    def pop(self) -> dict[str, float]:
        """Return the averages since the last call. Called by all ranks."""
        assert self.sums is not None
        means = self.sums / self.steps
        dist.all_reduce(means)
        self.sums, self.steps = None, 0
        return dict(zip(self.names, (means / dist.get_world_size()).tolist(), strict=True))


def peak_memory(device: torch.device) -> Row:
    """Return the peak memory so far in GiB: allocated and reserved on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # Linux reports KiB


class MetricsLogger:
    """Writes rows of metrics and shows progress: a dashboard on a terminal, lines of text elsewhere.

    Args:
        folder: The directory of metrics.jsonl.
        start: Step from which the run continues. Later rows of metrics.jsonl are deleted.
        total: Number of steps of the whole run.
        settings: The trackers to use.
        active: Whether this rank writes and shows anything; true on rank 0 only.
        run: The run directory, if `folder` is that of an evaluation.

    Attributes:
        evaluated_steps: Steps up to `start` whose kNN evaluation is in metrics.jsonl, on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        settings: MonitorSettings,
        *,
        active: bool,
        run: Path | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.active, self.unwritten = active, ""
        shared = [_delete_rows_after(self.path, start) if active else []]
        dist.broadcast_object_list(shared)
        (rows,) = shared
        self.evaluated_steps = {row["step"] for row in rows if "knn" in row}
        self.earlier_seconds = rows[-1]["seconds"] if rows else 0.0
        self.began = time.monotonic()
        self.dashboard: Dashboard | None = None
        self.trackers: dict[str, Tracker] = {}
        if not active:
            return
        self.trackers = open_trackers(settings, run or folder, folder, start)
        self.console = Console(stderr=False)
        self.start, self.total = start, total
        if self.console.is_interactive:
            self.dashboard = Dashboard(self.console, start, total)

    def __enter__(self) -> "MetricsLogger":
        """Start the dashboard."""
        if self.dashboard:
            self.dashboard.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the dashboard and close the trackers."""
        if self.dashboard:
            self.dashboard.live.stop()
        if self.unwritten:
            self._write(json.loads(self.unwritten.splitlines()[-1])["step"])
        close_trackers(self.trackers)

    @property
    def seconds(self) -> float:
        """Training time in seconds, over all starts of the run."""
        return self.earlier_seconds + time.monotonic() - self.began

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.dashboard:
            self.dashboard.advance(step)

    def print(self, text: str) -> None:
        """Print a line on the console, above the dashboard."""
        if self.active:
            with suppress(OSError):  # standard output may be a file on a full disk
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def log(self, row: Row) -> None:
        """Write and show one row, which must have a `step`. Logs a warning if the disk or a tracker fails."""
        if not self.active:
            return
        row = {**row, "seconds": round(self.seconds, 3)}
        self.unwritten += json.dumps(row) + "\n"
        self._write(row["step"])
        values = {name: value for name, value in flatten(row).items() if name != "step"}
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.add(row["step"], values)
            except OSError as error:
                log.warning("%s gets no more rows until the next start: %s", name, error)
                del self.trackers[name]  # TensorBoard's writer does not recover
        self._show(row)

    def _write(self, step: int) -> None:
        """Write what is not written yet. A disk that a checkpoint has filled has space again when that has failed."""
        try:
            _append(self.path, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            log.warning("metrics of step %d not written: %s", step, error)

    def _show(self, row: Row) -> None:
        if self.dashboard:
            self.dashboard.show(row)
        if "knn" in row:
            pixels = f" (raw pixels: {row['knn_pixels']:.4f})" if "knn_pixels" in row else ""
            more = "".join(f", {name} {value:.4f}" for name, value in more_knn(row).items())
            self.print(f"epoch {row['epoch']:g}: kNN {row['knn']:.4f}{pixels}{more}")
        elif not self.dashboard:
            pretext = f"pretext {row['pretext_top1']:.3f}  " if "pretext_top1" in row else ""
            status = f"loss {row['loss']:.3f}  {pretext}{row['images_per_second']:,.0f} img/s"
            left = (self.total - row["step"]) * row["images"] / row["step"] / row["images_per_second"]
            self.print(f"step {row['step']:,}/{self.total:,}  epoch {row['epoch']:.2f}  {status}  left {_clock(left)}")


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _append(path: Path, line: str) -> None:
    """Append a line, or nothing if the disk has no space for all of it."""
    content = line.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _delete_rows_after(path: Path, step: int) -> list[Row]:
    """Delete the rows after `step`, and incomplete lines, from the file; returns the remaining rows."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is now: while a dashboard is on the screen, rich's proxy, which prints above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The stream that a message is written to."""
        return sys.stderr


def set_up_logging(rank: int) -> None:
    """Log the project's messages to stderr: from level INFO on rank 0, from WARNING on the other ranks."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    for name in ("trainer", "data", "models", "kernels"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
