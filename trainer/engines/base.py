"""What makes the student learn and the teacher follow it: one protocol for DDP, FSDP2 and DeepSpeed ZeRO.

See docs/engines.md for what each does and when to take which.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.encoder import Encoder
from trainer.config import EngineSettings

State = dict[str, dict[str, Any]]


class LossScale:
    """The factor that keeps fp16 gradients from vanishing (arXiv 1710.03740): halved when they overflow, doubled
    after 2,000 steps in which they did not. The constants are those of torch.amp.GradScaler, which does not fit
    here: it looks at one rank's gradients, and under ZeRO ranks hold different ones.
    """

    def __init__(self, value: float = 65536.0) -> None:
        self.state = torch.tensor([value, 0.0])  # the factor, and steps since it changed

    @property
    def value(self) -> float:
        return float(self.state[0])

    def update(self, finite: bool) -> None:
        factor, steps = self.state.tolist()
        if not finite:
            factor, steps = factor / 2, 0
        elif steps + 1 == 2000:
            factor, steps = factor * 2, 0
        else:
            steps += 1
        self.state.copy_(torch.tensor([factor, steps]))


class NotFinite(ValueError):
    """The loss of some ranks, or the gradient, is not finite; nothing was updated."""

    def __init__(self, ranks: list[int], norm: float) -> None:
        """Describes the failed step.

        Args:
            ranks: Ranks whose loss is not finite; empty if only the gradient overflowed.
            norm: Norm of the gradient over all ranks.
        """
        where = f"the loss on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}, " if ranks else ""
        super().__init__(f"not finite: {where}gradient norm {norm}; nothing was updated")
        self.ranks = ranks


class Engine(Protocol):
    """A student that learns and a teacher, if there is one, that follows, spread over the ranks.

    All methods are called by all ranks. scale: in fp16, else None.
    """

    scale: LossScale | None

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of a batch; after the `last` gradients are averaged over ranks."""

    def student(self, views: list[Tensor]) -> Tensor:
        """The student's queries for views, to be called once for each `backward`."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""

    def step(self, lr: float) -> float:
        """Update the student, and give the length of the whole gradient before clipping, equal on all ranks.

        If that is not finite nothing is updated. Gradients are gone afterwards.
        """

    def update_teacher(self, momentum: float) -> None:
        """The teacher's step after the student's; nothing travels."""

    def weights(self) -> State:
        """student and teacher: name to tensor, whole or DTensor."""

    def state(self) -> State:
        """`weights`, and what the optimizer remembers of each parameter; for any engine and number of ranks."""

    def load(self, state: State) -> None:
        """Go on from what was written into the tensors of `state()`."""


def named_networks(student: Encoder, teacher: Encoder | None) -> dict[str, Encoder]:
    """The networks by the names that checkpoints give them; a method without a teacher has one."""
    return {"student": student, **({"teacher": teacher} if teacher else {})}


def named_state(student: nn.Module, optimizer: torch.optim.Optimizer, scale: LossScale | None) -> State:
    """What the optimizer remembers by parameter name, made if there was no step yet; and the loss scale."""
    state: State = {"optimizer": get_optimizer_state_dict(student, optimizer)["state"]}  # type: ignore[dict-item]
    return {**state, **({"loss_scale": {"state": scale.state}} if scale else {})}


def set_named_state(student: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give the optimizer what was loaded into `named_state`."""
    groups = get_optimizer_state_dict(student, optimizer)["param_groups"]
    set_optimizer_state_dict(student, optimizer, {"state": state["optimizer"], "param_groups": groups})


def unshard(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as each rank needs them to have all of the network."""
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}


def blocks(network: Encoder) -> list[nn.Module]:
    """The parts that a network is checkpointed, compiled and sharded by: a ResNet's or a ViT's blocks.

    Raises ValueError for a backbone that has none that are known.
    """
    found: list[nn.Module] = []
    for name in ("layer1", "layer2", "layer3", "layer4", "blocks", "stages"):
        found += _leaves(getattr(network.backbone, name, None))
    if not found:
        raise ValueError(
            f"engine: blocks of {type(network.backbone).__name__} are not known; "
            "need a ResNet, ViT or ConvNeXt, or engine.kind=ddp without activation_checkpointing and compile"
        )
    return found


def _leaves(module: nn.Module | None) -> list[nn.Module]:
    if module is None:
        return []
    inner = getattr(module, "blocks", module)  # a stage of a ConvNeXt
    if isinstance(inner, nn.Sequential | nn.ModuleList):
        return [leaf for child in inner for leaf in _leaves(child)]
    return [module]


def prepare_blocks(student: Encoder, teacher: Encoder | None, settings: EngineSettings) -> None:
    """Compilation innermost, activation checkpointing around it; sharding, which comes later, is outermost.

    Both replace the blocks' `forward`, so that parameters keep their names, and hooks stay outside.
    """
    if settings.compile:
        # Blocks share their class's code, and each shape of block and of view compiles it anew.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
        for block in [block for network in named_networks(student, teacher).values() for block in blocks(network)]:
            block.forward = torch.compile(block.forward, dynamic=False)
    if settings.activation_checkpointing:
        for block in blocks(student):
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=functools.partial(_contexts, block)
            )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first run of a checkpointed block, and around the one in backward."""
    return nullcontext(), _same_statistics(block)


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics are afterwards as before: the first run has counted the batch."""
    buffers = [b for m in block.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def make_contiguous(network: nn.Module) -> None:
    """Parameters in torch's default memory format, as cutting them asks for; images stay channels_last."""
    for p in network.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)  # new strides for 1 x 1 filters, too


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares over tensors, fp32 on the device."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).to(device, torch.float32).square().sum()


def update(
    optimizer: torch.optim.Optimizer,
    grads: list[list[Tensor]],
    norm: float,
    clip: float | None,
    scale: LossScale | None,
    lr: float,
) -> None:
    """One step, unless `norm` is not finite; gradients are gone afterwards.

    grads: what the optimizer's parameters have, a list for each device. norm: length of the whole gradient, without
    the loss scale that is still in `grads`; it is cut to `clip`. A group's learning rate is `lr` times its `lr_scale`.
    """
    if math.isfinite(norm):
        factor = (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / (scale.value if scale else 1.0)
        for tensors in grads:
            if tensors and factor != 1.0:
                torch._foreach_mul_(tensors, factor)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
    optimizer.zero_grad()
    if scale:
        scale.update(math.isfinite(norm))
