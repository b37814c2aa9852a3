"""A step that is not finite changes no bit of anything, nor do the steps that begin before the host knows of it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.negatives.queue import Queue
from tests.ranks import run_ranks
from tests.trainer.engines import SIDE, build_train_step, make_config, make_rank_info, outcome
from tests.trainer.test_engines import ENGINES, METHODS
from trainer.engines.finite import NotFinite, StepResult
from trainer.train_step import Rates, TrainStep


def build(name: str, engine: str, **sections: dict[str, Any]) -> TrainStep:
    """Return a training of a ResNet whose running statistics are those of each rank, except in BYOL."""
    method = {"bn": "sync" if name == "byol" else "shuffle", **METHODS[name].get("method", {})}
    config = make_config("resnet", **{**METHODS[name], **sections, "method": method}, engine=ENGINES[engine])
    return build_train_step(config, make_rank_info())


def step(train_step: TrainStep, number: int, bad: float | None = None) -> StepResult:
    """Take a step, in which an image of rank 1 has the value `bad`."""
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    views = [torch.randn(8, 3, SIDE, SIDE, generator=generator) for _ in range(3)]
    if bad is not None and dist.get_rank() == 1:
        views[1][3, 0, 5] = bad
    return train_step.step(views, number, Rates(0.05, 0.3, 0.9))


def overflow(train_step: TrainStep) -> None:
    """Let the next gradient overflow although the loss is finite."""
    engine: Any = train_step.engine
    original = engine.backward

    def backward(loss: Tensor) -> None:
        engine.backward = original
        original(loss * 1e30 * 1e30)

    engine.backward = backward


def everything(train_step: TrainStep) -> dict[str, Tensor]:
    """Return copies of all tensors that a step may change."""
    parts = outcome(train_step, [], [])._asdict()
    found = {f"{part} {name}": x for part in ("student", "teacher", "optimizer") for name, x in parts[part].items()}
    if negatives := train_step.method.negatives:
        found |= {f"negatives {i}": x.clone() for i, x in enumerate(negatives.tensors())}
        if isinstance(negatives, Queue):
            found["negatives pointer"] = negatives.pointer.clone()
    if scale := train_step.engine.scale:
        found["scale"] = scale.state.clone()
    return found


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, x in before.items() if not torch.equal(x, after[name])]


def fail(train_step: TrainStep, bad: float | None) -> list[str]:
    """Take a step that fails and another one, check the first, and return what has changed."""
    before = everything(train_step)
    if bad is None:
        overflow(train_step)
    failed = step(train_step, 1, bad)
    later = step(train_step, 2)
    changed = changes(before, everything(train_step))
    assert later.metrics["loss"].isfinite(), "the state that it starts from is intact"
    with pytest.raises(NotFinite, match="nothing was updated") as refusal:
        failed.check()
    assert (1 in refusal.value.ranks) == (bad is not None)
    train_step.intact.fill_(1)  # as in a new process
    return changed


def run_with_failures(engines: list[str], names: list[str], precision: str) -> list[tuple[str, list[str], list[str]]]:
    """Compare a training with failures to one without.

    Returns for each case its name, what a failure or its aftermath changed, and what a good step changes.
    """
    found = []
    for engine, name in [(engine, name) for engine in engines for name in names]:
        disturbed, other = (build(name, engine, run={"precision": precision}) for _ in range(2))
        for train_step in (disturbed, other):
            if scale := train_step.engine.scale:
                scale.state[0] = 16
        wrong = fail(disturbed, torch.inf)
        for number in (0, 1):
            before = everything(other)
            for train_step in (disturbed, other):
                step(train_step, number).check()
            wrong += changes(everything(disturbed), everything(other))
            if number == 0:  # in fp16, a gradient alone fails no step
                wrong += fail(disturbed, None if precision == "fp32" else torch.nan)
        found.append((f"{engine}, {name}", wrong, changes(before, everything(other))))
    return found


def check_cases(world_size: int, engines: list[str], names: tuple[str, ...], precision: str = "fp32") -> None:
    for ranks in run_ranks(world_size, run_with_failures, engines, list(names), precision):
        assert len(ranks) == len(engines) * len(names)
        for case, wrong, moved in ranks:
            assert not wrong, case
            parts = {name.split()[0] for name in moved}
            expected = {"student", "teacher", "optimizer", "negatives", "scale"}
            assert parts == expected - ({"negatives"} if "byol" in case else set()) - (
                {"scale"} if precision == "fp32" else set()
            )
            assert any("running_mean" in name for name in moved)


def test_nothing_moves() -> None:
    check_cases(2, ["ddp"], ("adco with predictor", "moco", "caco", "byol"))


@pytest.mark.slow
def test_nothing_moves_under_fsdp() -> None:
    check_cases(2, ["fsdp"], ("adco with predictor", "moco"))


def test_nothing_moves_in_fp16() -> None:
    check_cases(2, ["ddp"], ("adco with predictor", "moco"), "fp16")


@pytest.mark.slow
def test_nothing_moves_under_deepspeed() -> None:
    check_cases(2, ["zero1", "zero3"], ("adco with predictor", "moco"))


def overflow_in_fp16(engines: list[str], names: list[str]) -> list[tuple[str, list[str], float]]:
    """Return for each case its name, what changes in a step whose gradient overflows, and the new loss scale."""
    found = []
    for engine, name in [(engine, name) for engine in engines for name in names]:
        train_step = build(name, engine, run={"precision": "fp16"})
        assert train_step.engine.scale
        train_step.engine.scale.state[0] = 16
        step(train_step, 0).check()
        before = everything(train_step)
        train_step.engine.scale.state[0] = 2.0**100
        metrics, check = step(train_step, 1)
        check()
        assert metrics["skipped"] == 1
        assert metrics["grad_norm"] == 0
        changed = changes(before, everything(train_step))
        scale = float(train_step.engine.scale.value)
        train_step.engine.scale.state[0] = 16
        metrics, check = step(train_step, 2)
        check()
        assert metrics["skipped"] == 0
        found.append((f"{engine}, {name}", changed, scale))
    return found


def test_an_overflow_in_fp16_skips_the_student_s_update_only() -> None:
    names = ["adco with predictor", "moco", "caco"]
    for ranks in run_ranks(2, overflow_in_fp16, ["ddp", "fsdp"], names):
        for case, changed, scale in ranks:
            assert scale == 2.0**99, case
            own = [name for name in changed if name.startswith(("student", "optimizer")) and "running" not in name]
            assert not own, case
            parts = {name.split()[0] for name in changed}
            assert parts == {"student", "teacher", "negatives", "scale"}, case
