"""Phase times on the host, by device events and over ranks; stragglers; traces."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.run.phases import (
    PhaseTimer,
    PhaseTimes,
    find_straggler,
    gather_phase_times,
    host_names,
    phase_metrics,
    trace_steps,
)


def test_phases_add_up_until_they_are_taken() -> None:
    phases = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        with phases("data"):
            time.sleep(0.2)
        with phases("backward"):
            pass
    taken = phases.pop()
    assert list(taken) == ["data", "backward"]
    assert taken["data"] >= 0.4
    assert taken["backward"] < taken["data"] / 2
    assert phases.pop() == {}


class Event:
    """A fake CUDA event: the clock advances by a second at each record."""

    clock: Iterator[int]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self) -> None:
        self.at = next(Event.clock)

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: "Event") -> float:
        assert end.done, "an event that has not happened has no time"
        return 1e3 * (end.at - self.at)  # milliseconds


def test_a_gpu_is_waited_for_only_when_the_times_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.clock = iter([0, 3, 3, 4, 10, 12])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = PhaseTimer(torch.device("cuda"))
    for name in ("student", "ema", "student"):
        with phases(name):
            pass
    assert not any(end.done for _, _, end in phases.events)  # type: ignore[attr-defined]
    assert phases.pop() == {"student": 5, "ema": 1}


def slow_rank() -> tuple[dict[str, PhaseTimes], str | None, str | None]:
    hosts = host_names()
    rank = dist.get_rank()
    late = {"data": 8.0 if rank == 1 else 2.0, "student": 20.0, "save": 0.0 if rank else 90.0}
    phases = gather_phase_times(late, steps=10)
    even = gather_phase_times({"data": 2.0, "student": 20.0 + rank / 10}, steps=10)
    return phases, find_straggler(phases, hosts), find_straggler(even, hosts)


def test_the_slowest_rank_of_a_phase() -> None:
    for phases, late, even in run_ranks(3, slow_rank):
        assert phases["data"] == pytest.approx(PhaseTimes(mean=0.4, median=0.2, slowest=0.8, rank=1))
        assert phase_metrics(phases)["data"] == pytest.approx({"seconds": 0.4, "slowest": 0.8, "rank": 1})
        assert late is not None
        assert late.startswith("rank 1 on ")
        assert late.endswith("takes 0.8 s a step for data, the median rank 0.2 s")
        assert even is None


def test_a_trace_of_some_steps(tmp_path: Path) -> None:
    phases = PhaseTimer(torch.device("cpu"))
    with trace_steps(tmp_path / "trace.json", 2) as tracer:
        assert tracer is not None
        for step in range(20):
            with phases(f"step {step + 1}"):
                torch.zeros(2) + 1
            tracer.step()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("step ")} == {"step 10", "step 11"}
    with trace_steps(tmp_path / "none.json", 0) as tracer:
        assert tracer is None
    assert not (tmp_path / "none.json").exists()
