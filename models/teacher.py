"""The teacher: an exponential moving average of the student (momentum encoder, MoCo, arXiv 1911.05722).

It has no predictor (BYOL, arXiv 2006.07733, fig. 2).
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
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


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, local: Callable[[Tensor], Tensor] = lambda p: p
) -> None:
    """Set teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Args:
        teacher: Its parameters and floating buffers (BatchNorm's running statistics) are averaged, its other buffers
            copied. Tensors are matched by name; those that only the student has are ignored.
        student: The source.
        momentum: Weight of the teacher's old values.
        local: Returns this rank's shard of a parameter, for networks that are sharded in the same way.
    """
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    targets, sources = [], []
    counts, new_counts = [], []
    for name, p in teacher.named_parameters():
        targets.append(local(p))
        sources.append(local(parameters[name]))
    for name, buffer in teacher.named_buffers():
        if buffer.is_floating_point():
            targets.append(buffer)
            sources.append(buffers[name])
        else:
            counts.append(buffer)
            new_counts.append(buffers[name])
    if counts:  # BatchNorm's batch counts are copied together: one by one, a ResNet-50 would launch 53 copies
        torch._foreach_copy_(counts, new_counts)
    for device in {target.device for target in targets}:  # two if parameters are offloaded and buffers are not
        here = [i for i, target in enumerate(targets) if target.device == device]
        torch._foreach_lerp_([targets[i] for i in here], [sources[i] for i in here], 1 - momentum)
