"""Optimizers, and schedules as pure functions of the step."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

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
    groups: Iterable[dict[str, Any]]
    if settings.decay_norm_and_bias:
        groups = [{"params": list(student.parameters()), "weight_decay": settings.weight_decay}]
    else:
        groups = param_groups_weight_decay(student, settings.weight_decay)
    groups = [part for group in groups for part in _split(group)]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    if settings.name == "lars":
        return Lars(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Sharded and whole parameters apart: torch's multi-tensor operations do not take both at once."""
    sharded = [p for p in group["params"] if isinstance(p, DTensor)]
    whole = [p for p in group["params"] if not isinstance(p, DTensor)]
    return [{**group, "params": params} for params in (whole, sharded) if params]


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return x._local_tensor if isinstance(x, DTensor) else x


def shard_group(x: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold different parts of a tensor; None if each has all of it."""
    if not isinstance(x, DTensor):
        return None
    (dim,) = (d for d, placement in enumerate(x.placements) if isinstance(placement, Shard))
    return x.device_mesh.get_group(dim)


class Flat(NamedTuple):
    """What a flat parameter, as ZeRO makes them, is composed of.

    tensors: how many it has parts of over all ranks of `ranks`. parts: number of the tensor, start and length.
    """

    tensors: int
    parts: list[tuple[int, int, int]]
    ranks: dist.ProcessGroup | None


class Lars(torch.optim.Optimizer):
    """LARS (arXiv 1708.03888): SGD whose step is scaled, tensor by tensor, by eta |w| / (|g| + decay |w|).

    Groups without weight decay take plain SGD steps. As timm's, but with one reduction a group for all norms where
    parameters are sharded: DTensors, or flat parameters that are told of in `flat`.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0, eta: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})
        self.flat: dict[Tensor, Flat] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        numbers: list[int] = []  # of the tensor that each of them is a part of
        tensors, ranks = 0, None
        for p in group["params"]:
            if p.grad is None:
                continue
            if group["momentum"] and "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            whole = Flat(1, [(0, 0, -1)], shard_group(p))
            count, parts, ranks = self.flat.get(p, whole)
            for tensor, start, length in parts:
                numbers.append(tensors + tensor)
                for part, x in ((weights, p), (grads, p.grad), (momenta, self.state[p].get("momentum_buffer"))):
                    if x is not None:
                        part.append(local(x) if length < 0 else x.narrow(0, start, length))
            tensors += count
        if not tensors:
            return
        decay, momentum = group["weight_decay"], group["momentum"]
        if decay:
            norms = torch.zeros(2, tensors, device=local(group["params"][0]).device)
            if weights:
                squares = [torch.stack(torch._foreach_norm(x)).square() for x in (weights, grads)]
                norms[:, numbers] = torch.stack(squares).to(norms)
            if ranks is not None:
                dist.all_reduce(norms, group=ranks)
            w_T, g_T = norms.sqrt()
            ratio_T = group["eta"] * w_T / (g_T + decay * w_T + 1e-8)
            ratio_T = torch.where((w_T > 0) & (g_T > 0), ratio_T, 1.0)
        if not weights:
            return
        if decay:
            grads = list(torch._foreach_add(grads, weights, alpha=decay))
            torch._foreach_mul_(grads, [ratio_T[number] for number in numbers])
        if momentum:
            torch._foreach_mul_(momenta, momentum)
            torch._foreach_add_(momenta, grads)
            grads = momenta
        torch._foreach_add_(weights, grads, alpha=-group["lr"])
