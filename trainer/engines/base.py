"""The engine protocol: how student, teacher and optimizer are distributed over the ranks. Also what engines share.

An engine is one file with its `Settings`, the keys of the configuration's section `engine`, and a class that implements
`Engine`. docs/engines.md compares the engines.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.encoder import Encoder
from models.teacher import MovingAverage
from trainer.distributed import RankInfo
from trainer.engines.finite import LossScale, not_finite
from trainer.engines.optim import Optim, local, make_optimizer, set_learning_rates, shard_group
from trainer.schema import Section

State = dict[str, dict[str, Any]]


class EngineInputs(NamedTuple):
    """The inputs of an engine, besides its own settings.

    Attributes:
        student: The network that the optimizer trains.
        teacher: Its moving average; None for methods without one.
        optim: Settings of the optimizer.
        batch_size: Images per step over all ranks.
        rank_info: This process.
        precision: Dtype of autocast; torch.float32 means that autocast is off.
    """

    student: Encoder
    teacher: Encoder | None
    optim: Optim
    batch_size: int
    rank_info: RankInfo
    precision: torch.dtype


def _compile_of_earlier_versions(value: object) -> object:
    """Convert the values that `compile` had when it was true or false."""
    earlier = {"true": "blocks", "false": "none"}
    return earlier.get(str(value).lower(), value)


class EngineSettings(Section):
    """Keys that every engine has."""

    kind: str
    activation_checkpointing: bool = Field(
        False, description="Recompute the activations of each block in backward instead of storing them."
    )
    compile: Annotated[Literal["none", "blocks", "encoder"], BeforeValidator(_compile_of_earlier_versions)] = Field(
        "none",
        description="What torch.compile compiles: nothing, each block by itself, or the whole encoder as one graph, "
        "which launches least and takes longest to compile. A backbone must trace without a break.",
    )

    @model_validator(mode="after")
    def _an_encoder_is_not_checkpointed(self) -> "EngineSettings":
        if self.compile == "encoder" and self.activation_checkpointing:
            raise ValueError("compile: encoder does not go with activation_checkpointing; need compile: blocks")
        return self

    def build(self, inputs: EngineInputs) -> "Engine":
        """Return the engine; student and teacher are distributed over the ranks in place. Called by all ranks.

        Raises ValueError if the settings do not fit the networks or the ranks.
        """
        raise NotImplementedError


class Engine(Protocol):
    """Trains a student and updates its teacher, both distributed over the ranks. All ranks call all methods.

    Attributes:
        scale: The loss scale in fp16, else None.
        rates_on_device: Whether `step` takes its learning rates as fp32 scalars on the device, or as numbers.
    """

    scale: LossScale | None
    rates_on_device: bool

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for forward and backward of a micro-batch; the `last` one averages gradients."""

    def student(self, views: list[Tensor]) -> Tensor:
        """Return the student's embeddings [N, D] of views [B, 3, S_v, S_v]. Called once for each `backward`."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of the loss."""

    def step(self, lr: float | Tensor, backbone_lr: float | Tensor | None = None) -> Tensor:
        """Update the student and clear the gradients. The caller updates the loss scale.

        Returns:
            Norm of the gradient over all parameters and ranks before clipping, an fp32 scalar on the device. If it is
            not finite, no rank updates.
        """

    def update_teacher(self, momentum: float | Tensor, skip: Tensor | None = None) -> None:
        """Update the teacher's moving average of the student, without communication; see `MovingAverage.update`."""

    def weights(self) -> State:
        """Return parameters and buffers of student and teacher by name, as tensors or DTensors."""

    def state(self) -> State:
        """Return `weights` and the optimizer's state by parameter name; valid for any engine and number of ranks."""

    def load(self, state: State) -> None:
        """Restore the engine after a checkpoint was read into the tensors of `state()`."""


class TorchEngine:
    """The common part of DDP and FSDP: a torch optimizer over parameters that are replicated or DTensors."""

    rates_on_device = False

    def __init__(self, inputs: EngineInputs, teacher_dtype: torch.dtype = torch.float32) -> None:
        self.network, self.teacher = inputs.student, inputs.teacher
        self.moving_average = MovingAverage(self.teacher, self.network, local, teacher_dtype) if self.teacher else None
        self.parameters = list(inputs.student.parameters())  # once, because walking over a network takes time
        self.device, self.clip = inputs.rank_info.device, inputs.optim.clip
        self.scale = LossScale(self.device) if inputs.precision == torch.float16 else None
        self.optimizer = make_optimizer(inputs.student, inputs.optim)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        (loss * self.scale.value if self.scale else loss).backward()

    def step(self, lr: float | Tensor, backbone_lr: float | Tensor | None = None) -> Tensor:
        """See `Engine.step`."""
        trained = [p for p in self.parameters if p.grad is not None]
        sharded = [p for p in trained if isinstance(p, DTensor)]
        sharded_grads = [local(p.grad) for p in sharded if p.grad is not None]
        replicated_grads = [p.grad for p in trained if not isinstance(p, DTensor) and p.grad is not None]
        self.average(replicated_grads)
        squares = squared_norm(replicated_grads, self.device)
        if sharded:
            sharded_squares = squared_norm(sharded_grads, self.device)
            dist.all_reduce(sharded_squares, group=shard_group(sharded[0]))
            squares = sharded_squares + squares
        norm = squares.sqrt() / self.scale.value if self.scale else squares.sqrt()
        update(self.optimizer, norm, self.clip, self.scale, lr, backbone_lr)
        return norm

    def average(self, replicated_grads: list[Tensor]) -> None:
        """Average gradients of replicated parameters over ranks where backward has not done so."""

    def update_teacher(self, momentum: float | Tensor, skip: Tensor | None = None) -> None:
        """See `Engine.update_teacher`."""
        if self.moving_average:
            self.moving_average.update(momentum, skip)

    def weights(self) -> State:
        """See `Engine.weights`."""
        return {name: network.state_dict() for name, network in named_networks(self.network, self.teacher).items()}

    def state(self) -> State:
        """See `Engine.state`."""
        return {**self.weights(), **named_state(self.network, self.optimizer, self.scale)}

    def load(self, state: State) -> None:
        """See `Engine.load`."""
        set_named_state(self.network, self.optimizer, state)
        if self.moving_average:
            self.moving_average.loaded()


def average_over_ranks(grads: list[Tensor]) -> None:
    """Average small gradients, of one type, in one all-reduce."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        averaged = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [x.view_as(grad) for x, grad in zip(averaged, grads, strict=True)])


def named_networks(student: Encoder, teacher: Encoder | None) -> dict[str, Encoder]:
    """Return the networks by their names in checkpoints: student, and teacher if the method has one."""
    return {"student": student, **({"teacher": teacher} if teacher else {})}


def named_state(student: nn.Module, optimizer: torch.optim.Optimizer, scale: LossScale | None) -> State:
    """Return the optimizer's state by parameter name, created if there was no step yet, and the loss scale."""
    _complete_state(optimizer)
    state: State = {"optimizer": get_optimizer_state_dict(student, optimizer)["state"]}  # type: ignore[dict-item]
    return {**state, **({"loss_scale": {"state": scale.state}} if scale else {})}


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters without gradient, such as the pooler of a ViT, a state of zeros once the others have one.

    The checkpoint then has what torch creates for all parameters of a new optimizer before it loads.
    """
    if like := next((slots for p, slots in optimizer.state.items() if slots and p.dim()), None):
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
            if not optimizer.state[p]:
                optimizer.state[p] = {
                    key: torch.zeros_like(p) if x.dim() else torch.zeros_like(x) for key, x in like.items()
                }


def set_named_state(student: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Restore the optimizer from `named_state` after a checkpoint was read into it."""
    groups = get_optimizer_state_dict(student, optimizer)["param_groups"]
    set_optimizer_state_dict(student, optimizer, {"state": state["optimizer"], "param_groups": groups})


def unshard(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather the shards of DTensors, so that each rank has complete tensors. Called by all ranks."""
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}


def blocks(network: Encoder) -> list[nn.Module]:
    """Return a network's blocks, the units of checkpointing, compilation and sharding.

    Raises:
        ValueError: The backbone is not a ResNet, ViT or ConvNeXt or built like one.
    """
    found: list[nn.Module] = []
    for name in ("layer1", "layer2", "layer3", "layer4", "blocks", "stages"):
        found += _leaves(getattr(network.backbone, name, None))
    if not found:
        raise ValueError(
            f"engine: blocks of {type(network.backbone).__name__} are not known; "
            "need a ResNet, ViT or ConvNeXt, or engine.kind=ddp without activation_checkpointing and compile=blocks"
        )
    return found


def _leaves(module: nn.Module | None, nested: bool = False) -> list[nn.Module]:
    if module is None:
        return []
    inner = getattr(module, "blocks", module)  # a ConvNeXt stage keeps its blocks in an attribute
    is_layers = isinstance(inner, nn.Sequential) and len(inner) and not any(map(_has_children, inner))
    if isinstance(inner, nn.Sequential | nn.ModuleList) and not (nested and is_layers):  # layers in a row are a block
        return [leaf for child in inner for leaf in _leaves(child, nested=True)]
    return [module]


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def prepare_blocks(student: Encoder, teacher: Encoder | None, settings: EngineSettings) -> None:
    """Compile blocks or encoders and checkpoint activations, as the settings ask. Must come before sharding.

    Compilation is innermost, then checkpointing, then sharding. Both replace the modules' `forward`, so parameters keep
    their names and hooks stay outside.
    """
    networks = named_networks(student, teacher).values()
    if settings.compile != "none":
        # Blocks of one class share their code, and each shape of block and view compiles it again.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
    if settings.compile == "blocks":
        for block in [block for network in networks for block in blocks(network)]:
            block.forward = torch.compile(block.forward, dynamic=False)
    if settings.compile == "encoder":
        for network in networks:
            network.forward = _compile_whole(network.forward)  # type: ignore[assignment, method-assign]
    if settings.activation_checkpointing:
        for block in blocks(student):
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=functools.partial(_contexts, block)
            )


def _compile_whole(forward: Callable[[list[Tensor]], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Compile an encoder's `forward` as one graph for all views, whose sizes must be the same at every step."""
    compiled = torch.compile(forward, dynamic=False, fullgraph=True)

    def run(views: list[Tensor]) -> Tensor:
        try:
            return compiled(views)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"engine.compile: encoder cannot be compiled as one graph ({type(error).__name__}: {reason}); "
                "need engine.compile=blocks or none"
            ) from error

    return run


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts for a checkpointed block's forward and for its recomputation in backward."""
    return nullcontext(), _keep_running_statistics(block)


@contextmanager
def _keep_running_statistics(block: nn.Module) -> Iterator[None]:
    """Restore BatchNorm's running statistics afterwards: the first forward has already counted the batch."""
    buffers = [b for m in block.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def make_contiguous(network: nn.Module) -> None:
    """Put parameters in torch's default memory format, which sharding needs. Images stay channels_last."""
    for p in network.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)  # a clone resets the strides of 1 x 1 filters too


def squared_norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares over all tensors, an fp32 scalar on the device."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).to(device, torch.float32).square().sum()


def update(
    optimizer: Any,
    norm: Tensor,
    clip: float | None,
    scale: LossScale | None,
    lr: float | Tensor,
    backbone_lr: float | Tensor | None = None,
) -> None:
    """Take one optimizer step unless `norm` is not finite, and clear the gradients. Nothing is read by the host.

    Args:
        optimizer: One with the attributes `found_inf` and `grad_scale` of torch's fused optimizers.
        norm: Norm of the complete gradient, without the loss scale, fp32 scalar.
        clip: Maximum gradient norm, or None.
        scale: The loss scale by which the gradients are still multiplied, or None.
        lr: Learning rate, a number or an fp32 scalar on the device.
        backbone_lr: Learning rate of the backbone; None for `lr`.
    """
    divisor = scale.value if scale else None
    if clip is not None:
        excess = ((norm + 1e-6) / clip).clamp(min=1.0)
        divisor = excess if divisor is None else excess * divisor
    found_inf = not_finite(norm).float()
    if any(local(group["params"][0]).is_cpu for group in optimizer.param_groups):
        # The host runs the optimizer of offloaded parameters, so it waits until these numbers have arrived.
        found_inf, divisor = found_inf.cpu(), None if divisor is None else divisor.cpu()
    optimizer.grad_scale, optimizer.found_inf = divisor, found_inf
    set_learning_rates(optimizer.param_groups, lr, backbone_lr)
    optimizer.step()
    optimizer.zero_grad()
