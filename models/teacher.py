"""The teacher: an exponential moving average of the student (momentum encoder, MoCo, arXiv 1911.05722).

It has no predictor (BYOL, arXiv 2006.07733, fig. 2).
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def make_teacher(student: T) -> T:
    """Copy the student without its predictor and without gradients.

    BatchNorm's running statistics are updated from the student's only: in training mode the teacher normalises by its
    own batches, whose statistics must not enter the running ones.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.predictor = None  # type: ignore[assignment]
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


class MovingAverage:
    """Moves a teacher towards its student: teacher <- momentum * teacher + (1 - momentum) * student.

    Tensors are matched by name at the first update, when engines have distributed the networks, and kept in lists:
    walking over the names of a ResNet-50 would take a millisecond of every step.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        local: Callable[[Tensor], Tensor] = lambda p: p,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Prepare the average.

        Args:
            teacher: Its parameters and floating buffers (BatchNorm's running statistics) are averaged, its other
                buffers copied. Tensors that only the student has are ignored.
            student: The source.
            local: Returns this rank's shard of a parameter, for networks that are sharded in the same way.
            precision: Type of autocast, in which the teacher's weights are kept, too, see `_keep_casts`.
        """
        self._match = functools.partial(_match, teacher, student, local)
        self._tensors: _Tensors | None = None
        self._casts = _keep_casts(teacher, precision)

    @torch.no_grad()
    def update(self, momentum: float | Tensor, skip: Tensor | None = None) -> None:
        """Average once.

        Args:
            momentum: Weight of the teacher's old values; a number, or an fp64 scalar on the device, which the host does
                not read. At 1 the averaged tensors stay as they are, bit for bit, even if the student is not finite.
            skip: bool scalar on the device; where true, the same as momentum 1. None for false.
        """
        if self._tensors is None:
            self._tensors = self._match()
        if isinstance(momentum, Tensor):
            skip = momentum == 1 if skip is None else skip | (momentum == 1)
        if isinstance(momentum, Tensor) or momentum < 1:
            for teacher, student in self._tensors.averaged:
                _average(teacher, student, momentum, skip)
            for target, source in self._tensors.strided:
                averaged = target.lerp(source, _rate(momentum, target))
                target.copy_(averaged if skip is None else torch.where(skip, target, averaged))
        if self._tensors.copied[0]:
            torch._foreach_copy_(*self._tensors.copied)
        self.loaded()

    @torch.no_grad()
    def loaded(self) -> None:
        """Restore the weights in low precision after the teacher's parameters were written."""
        if self._casts[0]:
            torch._foreach_copy_(*self._casts)


class _Tensors(NamedTuple):
    """The tensors of a teacher and of its student, in pairs of lists of the same order.

    Attributes:
        averaged: Dense tensors, one pair of lists for each device and dtype.
        strided: Pairs of tensors whose elements do not lie next to each other, or in different orders.
        copied: Buffers that are not floating-point.
    """

    averaged: list[tuple[list[Tensor], list[Tensor]]]
    strided: list[tuple[Tensor, Tensor]]
    copied: tuple[list[Tensor], list[Tensor]]


def _match(teacher: nn.Module, student: nn.Module, local: Callable[[Tensor], Tensor]) -> _Tensors:
    sources = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    averaged: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    strided: list[tuple[Tensor, Tensor]] = []
    copied: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, x in (*teacher.named_parameters(), *teacher.named_buffers()):
        target, source = local(x), local(sources[name])
        if not target.is_floating_point():
            pair = copied
        elif target.stride() == source.stride() == torch.empty_like(target).stride():  # which is always dense
            pair = averaged.setdefault((target.device, target.dtype), ([], []))
        else:
            strided.append((target, source))
            continue
        pair[0].append(target)
        pair[1].append(source)
    return _Tensors(list(averaged.values()), strided, copied)


def _average(teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor, skip: Tensor | None) -> None:
    """Move dense tensors of one device and dtype in one launch."""
    if skip is None:
        assert not isinstance(momentum, Tensor)
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        return
    # torch._foreach_lerp_ would read the momentum on the host. The moving average is a step of SGD with learning rate
    # 1 - momentum on |teacher - student|^2 / 2, whose gradient is that of weight decay 1 minus the student. Torch's
    # fused SGD takes the rate, and whether to skip the step, from the device.
    if isinstance(momentum, Tensor):
        momentum = momentum.to(teacher[0].device)
    torch._fused_sgd_(
        teacher,
        student,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=_rate(momentum, teacher[0]),
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skip.to(teacher[0].device, torch.float32),
    )


def _rate(momentum: float | Tensor, like: Tensor) -> float | Tensor:
    """Return 1 - momentum; on the device in the type of the teacher, after a subtraction in that of the momentum."""
    return (1 - momentum).to(like) if isinstance(momentum, Tensor) else 1 - momentum


def _keep_casts(network: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Let a network without gradients use kept low-precision weights under autocast of `dtype`.

    Autocast casts the weights of convolutions and linear layers at every forward. Its cache holds weights with gradient
    only. The parameters stay fp32, and so do those of all other layers.

    Returns:
        The tensors in `dtype` and the parameters that they are copies of; none for fp32.
    """
    casts: tuple[list[Tensor], list[Tensor]] = ([], [])
    if dtype == torch.float32:
        return casts
    for module in network.modules():
        # Other classes may use their weights otherwise, and so may code that computes a weight or replaces a forward.
        if (
            type(module) in (nn.Linear, nn.Conv2d)
            and "weight" in module._parameters
            and "forward" not in module.__dict__
        ):
            own = {name: p.detach().to(dtype) for name, p in module.named_parameters(recurse=False)}
            casts[0].extend(own.values())
            casts[1].extend(module.parameters(recurse=False))
            module.forward = functools.partial(_forward, module, own["weight"], own.get("bias"))
    return casts


def _forward(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Compute the layer with `weight` and `bias` under autocast of their dtype, else with its own parameters."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != weight.dtype:
        weight, bias = module.weight, module.bias
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(x, weight, bias)
    assert isinstance(module, nn.Linear)
    return F.linear(x, weight, bias)
