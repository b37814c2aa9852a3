"""The teacher: an exponential moving average of the student (momentum encoder, MoCo, arXiv 1911.05722)."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def make_teacher(student: T) -> T:
    """A copy of the student that takes no gradient; its BatchNorm's running statistics follow the student's only.

    In training the teacher normalises by its own batches, whose statistics would otherwise enter the running ones.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, held: Callable[[Tensor], Tensor] = lambda p: p
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Parameters and floating buffers (BatchNorm's running statistics) are averaged, other buffers copied.
    held: what this rank holds of a parameter, where the two networks are cut in the same way over ranks.
    """
    targets = [held(p) for p in teacher.parameters()]
    sources = [held(p) for p in student.parameters()]
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        if target.is_floating_point():
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    assert len(targets) == len(sources)
    for device in {target.device for target in targets}:  # two where parameters are offloaded and buffers are not
        here = [i for i, target in enumerate(targets) if target.device == device]
        torch._foreach_lerp_([targets[i] for i in here], [sources[i] for i in here], 1 - momentum)
