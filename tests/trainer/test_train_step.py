"""A training step leaves out seeds that nothing needs, counters that nobody reads, and casts of weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.normalize import normalize
from tests.ranks import run_ranks
from tests.trainer.engines import SIDE, build_train_step, make_config, make_rank_info, train
from tests.trainer.small import VIT, VIT_ARGS
from trainer.run import checkpoint
from trainer.train_step import Rates, StepSeeds, TrainStep


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resume(train_step: TrainStep, config: Any, folder: Path) -> TrainStep:
    assert checkpoint.save(folder, 2, train_step.state(2), keep=1)
    resumed = build_train_step(config, make_rank_info())
    assert resumed.load(folder / "step-00000002") == 2
    return resumed


def draws(step: Callable[[], object]) -> bool:
    """Return whether a step draws from torch's generator or seeds it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    step()
    return not torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("network", ["resnet", "vit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_continues_with_the_same_bits(network: str, precision: str, tmp_path: Path) -> None:
    """This also holds with stochastic depth, whose random numbers follow from the step, and with kept bf16 weights."""
    model: dict[str, Any] = {}
    if network == "vit":
        model = {**VIT, "backbone_args": {**VIT_ARGS, "drop_path_rate": 0.5}}
    config = make_config(network, model=model, run={"precision": precision}, method={"bn": "local"})
    train_step = build_train_step(config, make_rank_info())
    train(train_step, config, steps=2)
    resumed = resume(train_step, config, tmp_path)
    assert train(train_step, config, steps=3, first=2) == train(resumed, config, steps=3, first=2)
    for part in ("student", "teacher"):
        for x, y in zip(*(t.state(0)[part].values() for t in (train_step, resumed)), strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("group")
def test_only_networks_that_draw_random_numbers_are_seeded() -> None:
    for rate in (0.0, 0.5):
        config = make_config("vit", model={**VIT, "backbone_args": {**VIT_ARGS, "drop_path_rate": rate}})
        train_step = build_train_step(config, make_rank_info())
        train(train_step, config, steps=2)
        assert draws(lambda s=train_step, c=config: train(s, c, steps=1, first=2)) == (rate > 0)  # type: ignore[misc]


@pytest.mark.parametrize("always", [False, True])
def test_code_from_outside_is_seeded_at_every_step(always: bool) -> None:
    """It may begin to draw at any step."""
    seeds = StepSeeds(torch.device("cpu"), always)
    for step in range(2):
        seeds.seed(step)
    assert draws(lambda: seeds.seed(2)) == always


def counters(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": x
        for part in ("student", "teacher")
        for name, x in state[part].items()
        if name.endswith("num_batches_tracked")
    }


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("head_norm", [False, True])
def test_batches_are_not_counted_and_counters_stay_in_checkpoints(head_norm: bool, tmp_path: Path) -> None:
    config = make_config("resnet", model={"head_norm": head_norm}, method={"bn": "local"})
    train_step = build_train_step(config, make_rank_info())
    networks = (train_step.method.student, train_step.method.teacher)
    assert not any(name.endswith("num_batches_tracked") for n in networks if n for name, _ in n.named_buffers())
    assert all(x == 0 for x in counters(train_step.state(0)).values())
    for x in counters(train_step.state(0)).values():
        x.fill_(7)  # as a run of an earlier version, which counted
    train(train_step, config, steps=2)
    resumed = resume(train_step, config, tmp_path)
    found = counters(resumed.state(0))
    assert sum(name.startswith("student") for name in found) == len(found) // 2
    assert len(found) == 2 * (13 + head_norm)
    assert all(x == 7 for x in found.values())
    running = [x for name, x in resumed.state(0)["student"].items() if name.endswith("running_mean")]
    assert all(x.abs().sum() > 0 for x in running), "the statistics themselves still move"


# Images as the loader makes them


def losses(precision: str, *, by_bytes: bool) -> list[float]:
    """Losses of two steps on this rank, with images normalised by the step or before."""
    config = make_config("resnet", method={"bn": "shuffle", "symmetric": True}, run={"precision": precision})
    train_step = build_train_step(config, make_rank_info())
    found = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        views = [torch.randint(256, (8, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator) for _ in range(3)]
        inputs = views if by_bytes else [normalize(view, torch.device("cpu")) for view in views]
        found.append(float(train_step.step(inputs, step, Rates(0.05, 3.0, 0.9)).metrics["loss"]))
    return found


def losses_of_both(precision: str) -> tuple[list[float], list[float]]:
    return losses(precision, by_bytes=True), losses(precision, by_bytes=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_and_normalised_images_train_alike_bit_for_bit(precision: str) -> None:
    """In bf16 the first convolution would round normalised fp32 images to the same numbers."""
    for by_bytes, normalized in run_ranks(2, losses_of_both, precision):
        assert by_bytes == normalized
        assert by_bytes[0] != by_bytes[1]
