"""Time per phase of a training step on each rank, detection of stragglers, and profiler traces."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import profile, record_function, schedule

STRAGGLER_SHARE = 0.1  # a straggler is behind the median rank by at least this share of a step


class PhaseTimes(NamedTuple):
    """Seconds per step that one phase takes: mean, median and maximum over ranks, and the slowest rank."""

    mean: float
    median: float
    slowest: float
    rank: int


class PhaseTimer:
    """Sums the time of each phase, measured on a GPU with events, so that only `pop` waits for the device.

    with phases("backward"):
        loss.backward()

    Phases must not be nested. They appear by name in the profiler's traces.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.is_muted = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the time of the `with` block."""
        with record_function(name):
            if self.is_muted:
                yield
            elif self.device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self.events.append((name, start, end))
            else:
                began = time.perf_counter()
                yield
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Measure nothing in the `with` block: an event that a CUDA graph captures has no time."""
        self.is_muted = True
        try:
            yield
        finally:
            self.is_muted = False

    def pop(self) -> dict[str, float]:
        """Return this rank's seconds by phase since the last call, in the order in which the phases first ran."""
        for name, start, end in self.events:
            end.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
        seconds, self.seconds, self.events = self.seconds, {}, []
        return seconds


def gather_phase_times(seconds: dict[str, float], steps: int) -> dict[str, PhaseTimes]:
    """Summarise the phase times of all ranks; called by all. `seconds` are this rank's sums over `steps` steps."""
    mine = torch.tensor(list(seconds.values()), dtype=torch.float64) / steps
    ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    by_rank = torch.stack(ranks)
    return {
        name: PhaseTimes(x.mean().item(), x.median().item(), x.max().item(), int(x.argmax()))
        for name, x in zip(seconds, by_rank.unbind(1), strict=True)
    }


def find_straggler(phases: dict[str, PhaseTimes], hosts: list[str]) -> str | None:
    """Describe the rank that slows down the others, or return None.

    The straggler is the rank that is furthest behind the median rank in a phase, by at least STRAGGLER_SHARE of a
    step. Ranks that wait for it in a collective all take equally long there, so only the straggler stands out. The
    phase `save` is ignored because rank 0 has more to copy.

    Args:
        phases: Phase times of all ranks.
        hosts: Host name of each rank.
    """
    phases = {name: phase for name, phase in phases.items() if name != "save"}
    name = max(phases, key=lambda name: phases[name].slowest - phases[name].median)
    phase, step = phases[name], sum(phase.mean for phase in phases.values())
    if phase.slowest - phase.median < STRAGGLER_SHARE * step:
        return None
    return (
        f"rank {phase.rank} on {hosts[phase.rank]} takes {phase.slowest:.3g} s a step for {name}, "
        f"the median rank {phase.median:.3g} s"
    )


def phase_metrics(phases: dict[str, PhaseTimes]) -> dict[str, Any]:
    """Return the entry `phases` of a row of metrics.jsonl."""
    return {name: {"seconds": s.mean, "slowest": s.slowest, "rank": s.rank} for name, s in phases.items()}


def host_names() -> list[str]:
    """Return the host name of each rank. Called by all ranks."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, platform.node())
    return names


@contextmanager
def trace_steps(path: Path, steps: int) -> Iterator[profile | None]:
    """Write a Chrome trace of `steps` steps, beginning with the tenth, to `path`.

    Yields a profiler, whose `step` must be called after each step, or None if `steps` is 0.
    """
    if not steps:
        yield None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # Kineto logs an error on machines without a GPU
    plan = schedule(skip_first=8, wait=0, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda tracer: tracer.export_chrome_trace(str(path))) as tracer:
        yield tracer
