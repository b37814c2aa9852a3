"""How long each phase of a step takes on each rank, who is slowest, and a trace for a closer look."""

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

STRAGGLES = 0.1  # of a step's time that a rank is behind the median one


class PhaseTimes(NamedTuple):
    """Seconds a step of one phase: mean over ranks, the median rank's, the slowest's, and the latter's number."""

    mean: float
    median: float
    slowest: float
    rank: int


class PhaseTimer:
    """Adds up the time of phases on the device; on a GPU by events, so that nothing waits for it until `pop`.

    with phases("backward"):
        loss.backward()

    Phases follow each other, none is inside another. A profiler sees them by their names.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with record_function(name):
            if self.device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self.events.append((name, start, end))
            else:
                began = time.perf_counter()
                yield
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def pop(self) -> dict[str, float]:
        """This rank's seconds of each phase since the last call, in the order in which they first ran."""
        for name, start, end in self.events:
            end.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
        taken, self.seconds, self.events = self.seconds, {}, []
        return taken


def gather_phase_times(seconds: dict[str, float], steps: int) -> dict[str, PhaseTimes]:
    """What all ranks took for each phase of a step, from each rank's sum over `steps`. Called by all ranks."""
    mine = torch.tensor(list(seconds.values()), dtype=torch.float64) / steps
    ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    by_rank = torch.stack(ranks)
    return {
        name: PhaseTimes(x.mean().item(), x.median().item(), x.max().item(), int(x.argmax()))
        for name, x in zip(seconds, by_rank.unbind(1), strict=True)
    }


def find_straggler(phases: dict[str, PhaseTimes], hosts: list[str]) -> str | None:
    """Who holds the others up: the rank that is furthest behind the median, if by a tenth of a step. hosts: by rank.

    A rank that waits for a slow one in a collective is late in the collective's phase as all others are, so only
    the slow one stands out. Not of `save`, in which rank 0 has more to copy than others.
    """
    phases = {name: phase for name, phase in phases.items() if name != "save"}
    name = max(phases, key=lambda name: phases[name].slowest - phases[name].median)
    late, step = phases[name], sum(phase.mean for phase in phases.values())
    if late.slowest - late.median < STRAGGLES * step:
        return None
    return (
        f"rank {late.rank} on {hosts[late.rank]} takes {late.slowest:.3g} s a step for {name}, "
        f"the median rank {late.median:.3g} s"
    )


def phase_metrics(phases: dict[str, PhaseTimes]) -> dict[str, Any]:
    """For a row of metrics: seconds, and the slowest rank's where there are several."""
    return {name: {"seconds": s.mean, "slowest": s.slowest, "rank": s.rank} for name, s in phases.items()}


def host_names() -> list[str]:
    """The machine of each rank. Called by all ranks."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, platform.node())
    return names


@contextmanager
def trace_steps(path: Path, steps: int) -> Iterator[profile | None]:
    """Writes a Chrome trace of `steps` steps, from the tenth on, to path; its `step` is to end each. None for 0."""
    if not steps:
        yield None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # to it a machine without a GPU is an error
    plan = schedule(skip_first=8, wait=0, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda tracer: tracer.export_chrome_trace(str(path))) as tracer:
        yield tracer
