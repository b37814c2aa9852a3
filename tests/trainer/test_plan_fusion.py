"""The planner predicts the launches and the memory traffic of a compiled encoder."""

import pytest
import torch
from torch import nn

from models.batchnorm import GroupBatchNorm
from trainer.plan.fusion import fuse
from trainer.plan.hardware import make_cluster
from trainer.plan.predict import COMPILED_LAUNCH_SECONDS, LAUNCH_SECONDS, phase_time
from trainer.plan.shape_only import ShapeOnlyMode
from trainer.plan.trace import Event, OperatorEvent, StepTrace

B, C, S = 8, 64, 56
IMAGE = 4 * B * C * S * S  # bytes of an activation in fp32


def traced(backward: bool = False, group: int = B) -> list[Event]:
    """The operators of convolution, BatchNorm, addition, ReLU and convolution, in the phases of a step."""
    with ShapeOnlyMode(), StepTrace(8) as trace:
        first, last = nn.Conv2d(C, C, 1, bias=False), nn.Conv2d(C, C, 1, bias=False)
        norm = nn.BatchNorm2d(C) if group == B else GroupBatchNorm(nn.BatchNorm2d(C), group)
        x = torch.empty(B, C, S, S)
        trace.events.clear()
        with torch.profiler.record_function("student"):
            y = last(torch.relu_(norm(first(x)) + x))
        if backward:
            with torch.profiler.record_function("backward"):
                y.sum().backward()
    return trace.events


def operators(events: list[Event]) -> list[OperatorEvent]:
    return [event for event in events if isinstance(event, OperatorEvent)]


def test_a_region_reads_what_enters_it_and_writes_what_is_used_later() -> None:
    eager = traced(backward=True)
    student = [event for event in operators(fuse(eager)) if event.phase == "student"]
    assert [event.name for event in student if event.bytes] == ["convolution", "fused", "convolution"]
    (region,) = (event for event in student if event.name == "fused" and event.bytes)
    # The convolution's output and x are read for the statistics and again to normalise and add; the sum is written.
    assert region.bytes == pytest.approx(5 * IMAGE, rel=0.01)
    unfused = sum(e.bytes for e in operators(eager) if e.phase == "student" and not e.flops)
    assert unfused == pytest.approx(8 * IMAGE, rel=0.01)  # BatchNorm 3, addition 3, ReLU 2


def test_backward_is_fused_too_and_no_tensor_is_forgotten() -> None:
    eager = traced(backward=True)
    fused = fuse(eager)
    by_phase = {
        name: [sum(e.bytes for e in operators(x) if e.phase == name) for x in (eager, fused)]
        for name in ("student", "backward")
    }
    for before, after in by_phase.values():
        assert 0.5 * before < after < before
    assert sum(e.flops for e in operators(fused)) == sum(e.flops for e in operators(eager))


def test_groups_of_a_batchnorm_read_as_much_as_one_group() -> None:
    whole, groups = (
        {
            phase: sum(e.bytes for e in operators(fuse(traced(True, group))) if e.phase == phase and not e.flops)
            for phase in ("student", "backward")
        }
        for group in (B, 2)
    )
    assert groups == pytest.approx(whole, rel=0.01)


def test_kernels_of_a_compiled_phase_are_launched_faster() -> None:
    fused = fuse(traced())
    student = operators(fused)
    assert all(event.compiled for event in student)
    # Two convolutions, two kernels of statistics, one of everything else, and the counter.
    assert len(student) == 6
    cluster = make_cluster("a100", 8, "ib-hdr")
    assert phase_time("student", fused, cluster).host == pytest.approx(6 * COMPILED_LAUNCH_SECONDS)
    assert phase_time("student", traced(), cluster).host == pytest.approx(6 * LAUNCH_SECONDS)


def test_other_phases_stay_as_they_are() -> None:
    eager = [event._replace(phase="optimizer") for event in traced()]
    assert fuse(list(eager)) == eager
