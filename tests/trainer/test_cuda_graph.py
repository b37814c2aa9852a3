"""A step that is captured and replayed trains exactly like an eager one.

No GPU is needed: `CpuGraph` has the semantics of a CUDA graph. It records every operator that torch dispatches in one
step, with the very tensors, and a replay calls the same operators with the same arguments again and writes the results
into the same memory. Whatever a step takes from Python, such as a rate, a seed or a branch, stays that of the recorded
step. The recorded step is executed, so the replay that follows a capture does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainer.engines import build_train_step, make_config, make_rank_info
from trainer import distributed
from trainer.cuda_graph import StepGraph, reason_against
from trainer.engines.finite import NotFinite
from trainer.run.phases import PhaseTimer
from trainer.train_step import Rates, TrainStep

STEPS, WARM_UP = 6, 2
CPU = torch.device("cpu")
SHUFFLE = {"bn": "shuffle", "bn_group": 4}
BANK = {"size": 64, "temperature": 0.2}
PREDICTOR = {"predictor": 24, "head_norm": True}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Call(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]


class Recorder(TorchDispatchMode):
    """Records and executes the operators of a step; a read by the host is an error, as in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname == "_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.calls.append(Call(func, args, kwargs or {}, tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            for recorded, new in zip(outputs, tree_leaves(function(*args, **kwargs)), strict=True):
                if not isinstance(new, Tensor):
                    if hasattr(new, "wait"):
                        new.wait()
                elif new.untyped_storage()._cdata != recorded.untyped_storage()._cdata:  # no view, nor in place
                    recorded.copy_(new)


class CpuGraph(StepGraph):
    """See the text of this module."""

    def make_stream(self) -> None:
        self.warm_up, self.captures = WARM_UP, 0

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        yield

    def capture(self, step: Callable[[list[Tensor]], Tensor], views: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Recorder() as recorder:
            values = step(views)
        replays = iter([lambda: None])
        self.captures += 1
        return lambda: next(replays, recorder.replay)(), values


def make_train_step(network: str, sections: dict[str, dict[str, Any]], graph: bool) -> TrainStep:
    torch.manual_seed(0)
    train_step = build_train_step(make_config(network, **sections), make_rank_info())
    if graph:
        train_step.graph = CpuGraph(CPU, train_step.phases, train_step._discard)
        train_step.graph.warm_up = WARM_UP
    return train_step


def take(train_step: TrainStep, step: int, sections: dict[str, dict[str, Any]], spoil: bool = False) -> dict[str, Any]:
    """Take a step with images and rates that no other step has, and return its metrics."""
    generator = torch.Generator().manual_seed(step)
    views = make_config("resnet", **{k: v for k, v in sections.items() if k == "data"}).data.views
    images = [torch.randn(16, 3, view.size, view.size, generator=generator) for view in views]
    if spoil:
        images[-1][0] = torch.nan
    frozen = None if "frozen_epochs" not in sections.get("optim", {}) else 0.01 * step
    rates = Rates(0.05 + 0.01 * step, 0.3 + 0.1 * step, 1 - 0.1 / (step + 1), frozen)
    metrics, check = train_step.step(images, 2**40 + step, rates)
    check()
    return {name: value.clone() for name, value in metrics.items()}


def tensors_of(train_step: TrainStep) -> dict[str, Tensor]:
    state = {k: v for k, v in train_step.state(0).items() if isinstance(v, dict)}
    found = {}
    for section, values in state.items():
        for name, value in values.items():
            for key, x in (value if isinstance(value, dict) else {"": value}).items():
                found[f"{section}.{name}.{key}"] = (x.to_local() if hasattr(x, "to_local") else x).clone()
    return found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7))] == []


CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "adco": ("resnet", {"method": SHUFFLE}),
    "adco, symmetric": ("resnet", {"model": PREDICTOR, "method": {**SHUFFLE, "symmetric": True}}),
    "adco, multi-crop": ("resnet", {"data": {"views": [{"size": 16}] * 2 + [{"size": 8}] * 2}}),
    "adco, bf16 bank": ("resnet", {"bank": {"weights": "bf16", "velocity": "bf16"}, "method": {"batch_keys": False}}),
    "adco, micro-batches": ("vit", {"method": {"bn": "local"}, "optim": {"name": "adamw", "accumulate": 2}}),
    "adco, lars": ("resnet", {"optim": {"name": "lars", "decay_norm_and_bias": False}}),
    "adco, layers": (
        "vit",
        {"model": {"weights": "none"}, "optim": {"name": "adamw", "layer_decay": 0.7, "frozen_epochs": 1}},
    ),
    "adco, fp16": ("resnet", {"run": {"precision": "fp16"}, "optim": {"clip": None}}),
    "adco, dropout": ("vit", {"model": {"backbone_args": {"proj_drop_rate": 0.2, "drop_path_rate": 0.2}}}),
    "moco": ("resnet", {"method": {"name": "moco", "symmetric": True, **SHUFFLE}, "bank": {**BANK, "size": 64}}),
    "caco": ("resnet", {"method": {"name": "caco"}, "bank": {**BANK, "weights": "bf16"}}),
    "acssl": ("resnet", {"model": PREDICTOR, "method": {"name": "acssl", "negatives_from": "bank", **SHUFFLE}}),
    "acssl, queue": (
        "resnet",
        {"model": PREDICTOR, "method": {"name": "acssl", "negatives_from": "queue"}, "bank": BANK},
    ),
    "simclr": ("resnet", {"method": {"name": "simclr"}, "data": {"views": [{"size": 16}] * 2}}),
    "byol": ("resnet", {"model": PREDICTOR, "method": {"name": "byol"}, "run": {"precision": "bf16"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_replays_train_like_eager_steps_bit_for_bit(name: str) -> None:
    network, sections = CASES[name]
    eager, replayed = (make_train_step(network, sections, graph) for graph in (False, True))
    for step in range(STEPS):
        assert_equal(take(eager, step, sections), take(replayed, step, sections))
    assert_equal(tensors_of(eager), tensors_of(replayed))
    assert isinstance(replayed.graph, CpuGraph)
    assert replayed.graph.captures == 1


def test_a_step_that_is_not_finite_changes_nothing_in_a_replay() -> None:
    sections = {"method": SHUFFLE}
    train_step = make_train_step("resnet", sections, graph=True)
    for step in range(WARM_UP + 2):
        take(train_step, step, sections)
    before = tensors_of(train_step)
    for step, spoil in ((4, True), (5, False)):  # a later step changes nothing either, until a checkpoint is loaded
        with pytest.raises(NotFinite):
            take(train_step, step, sections, spoil)
        assert_equal(tensors_of(train_step), before)


def test_a_step_that_cannot_be_captured_goes_on_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    """Here the loss is read on the host from the step of the capture on."""
    sections = {"method": {"bn": "local"}}
    eager, replayed = (make_train_step("vit", sections, graph) for graph in (False, True))
    loss = replayed.method.loss
    calls: list[float] = []

    def reads(*args: Any) -> Any:
        output = loss(*args)
        calls.append(float(output.loss.detach()) if len(calls) >= WARM_UP else 0.0)
        return output

    replayed.method.loss = reads  # type: ignore[assignment, method-assign]
    for step in range(STEPS):
        assert_equal(take(eager, step, sections), take(replayed, step, sections))
    assert_equal(tensors_of(eager), tensors_of(replayed))
    assert len(calls) == STEPS  # and the capture, which did not reach the end of the function
    assert [record.message for record in caplog.records] == [
        "engine.cuda_graph: the step cannot be captured (operation not permitted when stream is capturing); training "
        "goes on without it"
    ]


def test_what_is_known_to_prevent_a_graph_is_said_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    train_step = make_train_step("vit", {"engine": {"cuda_graph": True}}, graph=False)
    assert train_step.graph is None
    assert [r.message for r in caplog.records] == [
        "engine.cuda_graph: the device is a CPU; training goes on without a graph"
    ]
    gpu = torch.device("cuda", 0)
    config = make_config("vit", engine={"activation_checkpointing": True})
    assert reason_against(make_config("vit"), gpu) is None
    assert "activation_checkpointing" in (reason_against(config, gpu) or "")
    config = make_config("vit", model={"backbone": f"{__file__}:Backbone"})
    assert "backbone from outside" in (reason_against(config, gpu) or "")


def test_graphs_end_before_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for them."""
    graph = CpuGraph(CPU, PhaseTimer(CPU), lambda: None)
    graph.replay = lambda: None
    ended: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(graph.replay is None))
    distributed._destroy_group()
    assert ended == [True]
