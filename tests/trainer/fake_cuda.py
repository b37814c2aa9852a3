"""Training steps on CUDA tensors without values, on machines without a GPU: whatever makes the host wait is an error.

Rank 0 of a fake group of eight runs `TrainStep.step` on torch's fake tensors: forward, backward, optimizer, negatives
and teacher, then the linear probe, with the code that trains on GPUs. Fake tensors have a device but no values, so a
read by the host, an operator whose shape depends on values, or a mix of devices fails by itself; `_Watch` adds copies
that block.

What is not the code that trains: torch.autograd's engine in C++ takes no fake CUDA tensors, so `_backward` calls the
same nodes of the graph in Python. DDP's reducer takes none either, so gradients are not averaged. FSDP2 needs CUDA
streams and DeepSpeed reads the host itself (docs/engines.md), so both engines are left out. torch's fused optimizers
have no implementation for fake tensors: only the devices of their arguments are checked.
"""

import functools
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.amp.autocast_mode
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import trainer.build
from models.encoder import Encoder
from tests.trainer.engines import make_config
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines import ddp
from trainer.evaluate.online_probe import OnlineProbe
from trainer.run.metrics import Averages
from trainer.train_step import Rates, TrainStep

RANKS, DEVICE = 8, torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
SHARDS = {"sharded": 8, "node": 4, "replicated": 1}

Sections = dict[str, dict[str, Any]]
Plant = Callable[[Tensor], object]  # is called with the loss of each step


class Case(NamedTuple):
    """A network of `tests.trainer.engines`, sections of its configuration, and a fault to plant."""

    network: str
    sections: Sections
    plant: Plant | None = None


def find_waits(cases: list[Case]) -> list[str | None]:
    """Run two steps of each case, in a process of its own.

    Returns for each case where and why the second step makes the host wait, mixes devices or fails; None if nowhere.
    """
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        return pool.submit(_find_waits, cases).result()


def _find_waits(cases: list[Case]) -> list[str | None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    _replace_what_needs_a_gpu()
    return [_find_wait(*case) for case in cases]


def _find_wait(network: str, sections: Sections, plant: Plant | None) -> str | None:
    run = {"precision": "bf16", "device": "auto", **sections.get("run", {})}
    config = make_config(network, **{**sections, "run": run})
    images = [
        torch.empty(config.data.batch_size // RANKS, view.size, view.size, 3, dtype=torch.uint8)
        for view in config.data.views
    ]
    labels = torch.zeros(len(images[0]), dtype=torch.int64)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            train_step = TrainStep(config, RankInfo(DEVICE, 0, RANKS, SHARDS["node"]))
            train_step.seeds.draws = True  # to find out, the first two steps compare the generators' states
            if plant is not None:
                train_step.method.loss = functools.partial(_planted, train_step.method.loss, plant)  # type: ignore[method-assign]
            probe = OnlineProbe(train_step.method.student, 10, DEVICE)
            averages = Averages()
            for number in range(2):
                views = [image.to(DEVICE, non_blocking=True) for image in images]
                with _Watch(active=number == 1):
                    views = [image.to(DEVICE, non_blocking=True) for image in images]
                    metrics = train_step.step(views, number, Rates(0.1, 3.0, 0.99)).metrics
                    labels_B = labels.to(DEVICE, non_blocking=True).chunk(train_step.accumulate)[-1]
                    found = probe.step(labels_B, train_step.intact)
                    assert found
                    averages.add(metrics | found)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_ours(f.filename)]
        where = (
            f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
        )
        return f"{where}: {type(error).__name__}: {error}"
    return None


def _planted(loss: Callable[..., Any], plant: Plant, *args: Any) -> Any:
    output = loss(*args)
    plant(output.loss.detach())
    return output


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(ROOT) and "site-packages" not in file and file != __file__


class _Watch(TorchDispatchMode):
    """Raises RuntimeError where the host would wait for the device although fake tensors do not mind."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if name.startswith("_fused_"):
            devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            if devices != {"cuda"}:
                raise RuntimeError(f"{name}: tensors on {sorted(devices)}")
            return None
        if self.active:
            source, target, non_blocking = None, None, kwargs.get("non_blocking")
            if name == "_to_copy":
                source, target = args[0].device, kwargs.get("device")
            elif name == "copy_":
                source, target, non_blocking = args[1].device, args[0].device, non_blocking or args[2:] == (True,)
            if source and target and source.type != torch.device(target).type and not non_blocking:
                raise RuntimeError(f"a copy from {source} to {target} that blocks")
            if name.startswith("index_put") and any(i is not None and i.dtype == torch.bool for i in args[1]):
                raise RuntimeError("an assignment to a mask, which counts its elements on the host")
        return func(*args, **kwargs)


@torch.no_grad()
def _backward(loss: Tensor) -> None:
    """Compute the gradients as `loss.backward()` does, node by node."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    while stack:
        node, visited = stack.pop()
        if visited:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    grads: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        own = grads.pop(node, {})
        if not own:
            continue
        if type(node).__name__ == "AccumulateGrad":
            p = node.variable
            p.grad = own[0] if p.grad is None else p.grad + own[0]
            continue
        outputs = node._input_metadata
        given: list[Any] = [own.get(i) for i in range(len(outputs))]
        if isinstance(node, BackwardCFunction):
            zeros = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in outputs]
            given = [zero if grad is None else grad for zero, grad in zip(zeros, given, strict=True)]
            found = node._forward_cls.backward(node, *given)  # type: ignore[attr-defined]
        else:
            found = node(*given)
        for (following, i), grad in zip(
            node.next_functions, found if isinstance(found, tuple) else (found,), strict=False
        ):
            if following is not None and grad is not None:
                expected = following._input_metadata[i]
                assert grad.device == expected.device
                grad = grad.sum_to_size(expected.shape).to(expected.dtype)
                others = grads.setdefault(following, {})
                others[i] = others[i] + grad if i in others else grad


class _Unwrapped(nn.Module):
    """A wrapper in place of DistributedDataParallel, which averages no gradients."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__()
        self.network = network

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(network: nn.Module, names: list[str]) -> None:
        """Do nothing: the wrapper averages no gradients."""

    def forward(self, views: list[Tensor]) -> Any:
        return self.network(views)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Event:
    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        pass


def _replace_what_needs_a_gpu() -> None:
    """Replace names in this process. Meshes need values, so they are made outside of the fake tensors."""
    meshes = {
        placement: init_device_mesh("cuda", (RANKS // shards, shards), mesh_dim_names=("replica", "shard"))
        for placement, shards in SHARDS.items()
    }
    names: dict[Any, dict[str, Any]] = {
        trainer.build: {
            "make_mesh": lambda placement, *_: meshes[placement],
            "build_encoder": functools.partial(_build_encoder, trainer.build.build_encoder),
        },
        Encoder: {"to": lambda self, *_, **__: self},  # Module.to takes no fake tensors
        dist: {"new_group": lambda **_: dist.group.WORLD},
        ddp: {"DistributedDataParallel": _Unwrapped},
        Tensor: {"backward": _backward, "pin_memory": lambda self: self},
        torch.cuda: {"Event": _Event, "is_bf16_supported": lambda **_: True},
        torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
    }
    for owner, replaced in names.items():
        for name, value in replaced.items():
            setattr(owner, name, value)


def _build_encoder(build: Callable[..., Encoder], config: Config) -> Encoder:
    """Build an encoder, which reads values on the host, and put it on the device."""
    encoder: Encoder = _with_values(build, config)
    for module in encoder.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in list(tensors.items()):
                if x is not None:
                    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
                    setattr(module, name, nn.Parameter(empty) if isinstance(x, nn.Parameter) else empty)
    return encoder


def _with_values(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that computes with values on the host."""
    with _disable_current_modes():
        return function(*args)
