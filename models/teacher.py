"""The teacher: an exponential moving average of the student (momentum encoder, MoCo, arXiv 1911.05722).

It is a student without a predictor (BYOL, arXiv 2006.07733, fig. 2).
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def make_teacher(student: T) -> T:
    """A copy of the student, without predictor, that takes no gradient.

    Its BatchNorm's running statistics follow the student's only.

    In training the teacher normalises by its own batches, whose statistics would otherwise enter the running ones.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.predictor = None  # type: ignore[assignment]
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return teacher


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, held: Callable[[Tensor], Tensor] = lambda p: p
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Parameters and floating buffers (BatchNorm's running statistics) are averaged, other buffers copied; matched by
    name, so that what only the student has takes no part.
    held: what this rank holds of a parameter, where the two networks are cut in the same way over ranks.
    """
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    targets, sources = [], []
    counts, counted = [], []
    for name, p in teacher.named_parameters():
        targets.append(held(p))
        sources.append(held(parameters[name]))
    for name, buffer in teacher.named_buffers():
        if buffer.is_floating_point():
            targets.append(buffer)
            sources.append(buffers[name])
        else:
            counts.append(buffer)
            counted.append(buffers[name])
    if counts:  # of BatchNorm's batches: together, for a ResNet-50 would launch 53 of these copies
        torch._foreach_copy_(counts, counted)
    for device in {target.device for target in targets}:  # two where parameters are offloaded and buffers are not
        here = [i for i, target in enumerate(targets) if target.device == device]
        torch._foreach_lerp_([targets[i] for i in here], [sources[i] for i in here], 1 - momentum)
