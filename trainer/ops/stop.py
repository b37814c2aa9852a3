"""Stops a run before its last step, on all ranks after the same step: by a signal, a file or a time limit.

The run saves a checkpoint before it exits, and the same command resumes it.
"""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import raise_on_all_ranks
from trainer.run.files import write_json

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, try again
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_STOP_FILE, _STOPPED_FILE = "stop", "stopped.json"
_POLL_SECONDS = 0.2  # the run directory may be on a slow network file system


class Stopped(Exception):
    """The run stopped before its last step and saved a checkpoint."""


class StopHandler:
    """Decides whether to stop, equally on all ranks. All methods are called by all ranks.

        with StopHandler(folder, deadline) as stop:
            for step in steps:
                ...
                if stop.should_stop():
                    break

    A stop is requested by SIGTERM, SIGUSR1 or SIGINT to any rank, by a file `stop` in the run directory, or by the
    deadline. Repeated signals count once, because SLURM and torchrun may both send them; only a second SIGINT
    interrupts the process.

    Args:
        folder: The run directory.
        deadline: Unix time at which the process must have exited, or None.
        margin: Seconds before the deadline at which to stop, for the checkpoint.
    """

    def __init__(self, folder: Path, deadline: float | None = None, margin: float = 120.0) -> None:
        self.folder, self.reason = folder, ""
        self.stop_time = None if deadline is None else deadline - margin
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group  # gloo, so that its all-reduce does not wait for the GPU
        self.is_rank_0 = dist.get_rank() == 0
        self.vote: torch.Tensor | None = None
        self.work: Any = None
        self.earlier_handlers: dict[int, Any] = {}
        self.next_poll = 0.0

    def __enter__(self) -> "StopHandler":
        """Install the signal handlers."""
        if self.is_rank_0:
            (self.folder / _STOPPED_FILE).unlink(missing_ok=True)
        for number in _SIGNALS:
            self.earlier_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the signal handlers."""
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)
        if self.work is not None and kind is None:
            self.work.wait()

    def should_stop(self) -> bool:
        """Return whether any rank had a reason to stop before the previous call. To be called after each step.

        The all-reduce of one call runs during the next step, so no rank waits for it.
        """
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.vote:
                return True
        self._poll()
        self.vote = torch.tensor(int(bool(self.reason)))
        self.work = dist.all_reduce(self.vote, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return False

    def raise_stopped(self, step: int, save_error: str | None = None) -> None:
        """Write stopped.json, for scripts and people, and raise Stopped.

        Args:
            step: The last step.
            save_error: Why the checkpoint of this step is not saved, if it is not.

        Raises:
            Stopped: The run stopped in good order.
            ValueError: The checkpoint or stopped.json is not saved. On all ranks.
        """
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, self.reason, group=self.group)
        reason = "; ".join(sorted({r for r in reasons if r}))
        if self.is_rank_0:
            try:
                (self.folder / _STOP_FILE).unlink(missing_ok=True)
                if save_error is None:
                    write_json(self.folder / _STOPPED_FILE, {"step": step, "reason": reason})
            except OSError as error:
                save_error = str(error)
        raise_on_all_ranks(save_error and f"stopped after step {step} ({reason}), but: {save_error}")
        raise Stopped(f"stopped after step {step} ({reason}): the same command resumes the run")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self.earlier_handlers[number])
        self.reason = signal.Signals(number).name

    def _poll(self) -> None:
        if self.stop_time is not None and time.time() > self.stop_time:
            self.reason = "out of time"
        if self.is_rank_0 and time.monotonic() > self.next_poll:
            self.next_poll = time.monotonic() + _POLL_SECONDS
            if (self.folder / _STOP_FILE).exists():
                self.reason = "asked by file"


def deadline(max_minutes: float | None, started: float) -> float | None:
    """Return the Unix time at which this process must have exited, or None.

    Args:
        max_minutes: The limit run.max_minutes of the configuration.
        started: Unix time at which the process started. SLURM's time limit is read from the environment; one that
            was over by then is of an earlier job, and is ignored.
    """
    limits = []
    if max_minutes is not None:
        limits.append(started + 60 * max_minutes)
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        if float(end) > started:
            limits.append(float(end))
        elif not dist.is_initialized() or dist.get_rank() == 0:
            log.warning("SLURM_JOB_END_TIME=%s is in the past and is ignored: it belongs to an earlier job", end)
    return min(limits, default=None)


def exit_code() -> int:
    """Return the exit code of a process whose run has stopped.

    torchrun treats every code but 0 as a failure; under torchrun the file stopped.json carries the information.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_CODE
