"""Stops a run before its last step, on all ranks after the same step: by a signal, a file or a time limit.

The run saves a checkpoint before it exits, and the same command resumes it.
"""

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import raise_on_all_ranks
from trainer.ops import peers
from trainer.ops.ending import Stopped, StopSignals, exit_code
from trainer.run.files import write_json

__all__ = ["StopHandler", "Stopped", "deadline", "exit_code", "interruptible"]

log = logging.getLogger(__name__)

_SIGNALS = (*StopSignals.signals, signal.SIGINT)
_STOP_FILE, _STOPPED_FILE = "stop", "stopped.json"
_POLL_SECONDS = 0.2  # the run directory may be on a slow network file system
_VOTE_SECONDS = 0.5  # between two votes; a request is noticed at the second one after it
_MAX_STEPS_BETWEEN_VOTES = 16  # steps may become slower than they were at the last vote


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
        vote_seconds: Time between two votes of the ranks; 0 for a vote after every step.
    """

    def __init__(
        self,
        folder: Path,
        deadline: float | None = None,
        margin: float = 120.0,
        vote_seconds: float = _VOTE_SECONDS,
    ) -> None:
        self.folder, self.reason = folder, ""
        self.stop_time = None if deadline is None else deadline - margin
        self.is_rank_0, self.vote_seconds = dist.get_rank() == 0, vote_seconds
        self.steps, self.steps_between_votes, self.last_vote = 0, 1, time.monotonic()
        self.vote = torch.zeros(2, dtype=torch.float64)  # in host memory, so that gloo reduces it beside the GPU's work
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
        """Return whether any rank had a reason to stop at the previous vote. To be called after each step.

        The all-reduce of a vote runs until the next one, so no rank waits for it.
        """
        self._poll()
        self.steps += 1
        if self.steps < self.steps_between_votes:
            return False
        if self.work is not None:
            self.work.wait()
            self.work = None
            stop, seconds_per_step = self.vote.tolist()
            if stop:
                return True
            self.steps_between_votes = self._plan(seconds_per_step)
        now = time.monotonic()
        self.vote = torch.tensor([float(bool(self.reason)), (now - self.last_vote) / self.steps], dtype=torch.float64)
        self.work = dist.all_reduce(self.vote, dist.ReduceOp.MAX, async_op=True)
        self.last_vote, self.steps = now, 0
        return False

    def _plan(self, seconds_per_step: float) -> int:
        """Return the number of steps until the next vote, from the step time of the slowest rank: equal on all ranks.

        The cost of a vote grows with the number of ranks, so there are about as many per second for any step time: 8
        processes on 2 cores with steps of 30 ms spend 0.04 ms per step on it, and 1.6 ms with a vote after every step.
        One rank alone needs no agreement.
        """
        if dist.get_world_size() == 1:
            return 1
        return min(max(1, int(self.vote_seconds / max(seconds_per_step, 1e-9))), _MAX_STEPS_BETWEEN_VOTES)

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
        dist.all_gather_object(reasons, self.reason)
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


@contextmanager
def interruptible(
    folder: Path, deadline: float | None = None, margin: float = 120.0, *, by_file: bool = True
) -> Iterator[None]:
    """Stop work that has no steps and keeps nothing. Called by all ranks.

    The requests are those of `StopHandler`, apart from SIGINT. The rank that notices one raises Stopped, and the others
    end because it has ended (`trainer.ops.peers`).

    Args:
        folder: The directory for `stop` and stopped.json.
        deadline: Unix time at which the process must have exited, or None.
        margin: Seconds before the deadline at which to stop.
        by_file: Whether the file `stop` counts; not if a training loop follows, which saves before it stops.

    Raises:
        Stopped: The work was stopped.
        ValueError: It was, but only because another rank has ended, after which torchrun sends SIGTERM to all.
    """
    is_rank_0, signals, closed = dist.get_rank() == 0, StopSignals(), threading.Event()

    def is_requested() -> bool:
        if deadline is not None and time.time() > deadline - margin:
            signals.request("out of time")
        elif by_file and is_rank_0 and (folder / _STOP_FILE).exists():
            signals.request("asked by file")
        return bool(signals.requested)

    def watch() -> None:
        while not closed.wait(_POLL_SECONDS) and not is_requested():
            pass

    if is_rank_0:
        (folder / _STOPPED_FILE).unlink(missing_ok=True)
    try:
        with signals:
            threading.Thread(target=watch, name="stop", daemon=True).start()
            try:
                is_requested()
                yield
            finally:
                closed.set()
    except Stopped as stopped:
        if not peers.stop_together(exit_code(), str(stopped)):
            raise ValueError(f"stopped ({signals.reason}), but other ranks do not answer: one has failed") from None
        (folder / _STOP_FILE).unlink(missing_ok=True)
        if signals.reason:  # else another rank has it
            write_json(folder / _STOPPED_FILE, {"reason": signals.reason})
        raise


def deadline(max_minutes: float | None, started: float) -> float | None:
    """Return the Unix time at which this process must have exited, or None.

    Args:
        max_minutes: The limit run.max_minutes of the configuration.
        started: Unix time at which the process started. SLURM's time limit is read from the environment; one that
            was over by then is of an earlier job, and is ignored.
    """
    slurm = _slurm_end(os.environ.get("SLURM_JOB_END_TIME", ""), started)
    own = None if max_minutes is None else started + 60 * max_minutes
    return min((limit for limit in (own, slurm) if limit is not None), default=None)


@functools.cache  # warns once
def _slurm_end(text: str, started: float) -> float | None:
    end = float(text) if text.isdecimal() else 0.0
    if end > started:
        return end
    if text and (not dist.is_initialized() or dist.get_rank() == 0):
        problem = "is in the past and is ignored: it belongs to an earlier job" if end else "is not a time: ignored"
        log.warning("SLURM_JOB_END_TIME=%s %s", text, problem)
    return None
