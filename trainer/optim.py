"""Optimizers, and schedules as pure functions of the step."""

import math
from collections.abc import Iterable

import torch
from timm.optim import Lars, param_groups_weight_decay
from torch import nn

from trainer.config import Optim


def cosine(step: int, steps: int, start: float, final: float, warmup_steps: float = 0) -> float:
    """From start at step 0 along half a cosine to final at `steps`, after a linear warm-up from 0."""
    if step < warmup_steps:
        return start * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2


def scaled_lr(lr: float, batch_size: int) -> float:
    """The learning rate for a batch from that for 256 images (arXiv 1706.02677)."""
    return lr * batch_size / 256


def make_optimizer(student: nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """SGD, LARS or AdamW over the student's parameters; the learning rate is set at every step."""
    groups: Iterable
    if settings.decay_norm_and_bias:
        groups = [{"params": list(student.parameters()), "weight_decay": settings.weight_decay}]
    else:
        groups = param_groups_weight_decay(student, settings.weight_decay)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    if settings.name == "lars":
        return Lars(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
