"""An orderly end before the last step: asked for by a signal, a file or the clock, agreed on by all ranks.

A job that is preempted, or out of its time, saves a checkpoint at a step's end and leaves; the same command goes on.
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

from trainer.run.files import write_json

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ASK_FILE, _LEFT_FILE = "stop", "stopped.json"
_LOOK = 0.2  # seconds


class Stopped(Exception):
    """Training ended before its last step, with a checkpoint."""


class StopHandler:
    """Whether to end early, the same on all ranks at the same step; made and called by all ranks.

        with StopHandler(folder, deadline) as stop:
            for step in steps:
                ...
                if stop.should_stop():
                    break

    Asked for by SIGTERM, SIGUSR1 or SIGINT (a second SIGINT ends the process as it always does; of the others several
    may come for one request, from SLURM and from torchrun) to any rank, by a file `stop` in the run's folder, or when
    `deadline`, in seconds of the epoch, is `margin` seconds ahead: time for the checkpoint.
    """

    def __init__(self, folder: Path, deadline: float | None = None, margin: float = 120.0) -> None:
        self.folder, self.reason = folder, ""
        self.latest = None if deadline is None else deadline - margin
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group  # its all-reduce never waits for a device
        self.first = dist.get_rank() == 0
        self.vote: torch.Tensor | None = None
        self.work: Any = None
        self.handlers: dict[int, Any] = {}
        self.next_look = 0.0

    def __enter__(self) -> "StopHandler":
        if self.first:
            (self.folder / _LEFT_FILE).unlink(missing_ok=True)
        for number in _SIGNALS:
            self.handlers[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.work is not None and kind is None:
            self.work.wait()

    def should_stop(self) -> bool:
        """Called after each step: whether a rank had asked by the end of the step before.

        The votes of one step are counted during the next, so nobody waits for them.
        """
        agreed = False
        if self.work is not None:
            self.work.wait()
            agreed = bool(self.vote)
        if not agreed:
            self._look()
            self.vote = torch.tensor(int(bool(self.reason)))
            self.work = dist.all_reduce(self.vote, dist.ReduceOp.MAX, group=self.group, async_op=True)
        else:
            self.work = None
        return agreed

    def raise_stopped(self, step: int) -> None:
        """Write down where training stopped, for scripts and people, and raise Stopped. Called by all ranks."""
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, self.reason, group=self.group)
        reason = "; ".join(sorted({r for r in reasons if r}))
        if self.first:
            (self.folder / _ASK_FILE).unlink(missing_ok=True)
            write_json(self.folder / _LEFT_FILE, {"step": step, "reason": reason})
        raise Stopped(f"stopped after step {step} ({reason}): the same command goes on from there")

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self.handlers[number])
        self.reason = signal.Signals(number).name

    def _look(self) -> None:
        if self.latest is not None and time.time() > self.latest:
            self.reason = "out of time"
        if self.first and time.monotonic() > self.next_look:  # at most so often: the folder may be far away
            self.next_look = time.monotonic() + _LOOK
            if (self.folder / _ASK_FILE).exists():
                self.reason = "asked by file"


def deadline(max_minutes: float | None, started: float) -> float | None:
    """When this process must have ended, in seconds of the epoch: by its own limit, or by SLURM's; None for never."""
    limits = []
    if max_minutes is not None:
        limits.append(started + 60 * max_minutes)
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        limits.append(float(end))
    return min(limits, default=None)


def exit_code() -> int:
    """That of a process that stopped in good order.

    torchrun takes every code but 0 for a failure, and restarts or reports it: there the file stopped.json tells.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_CODE
