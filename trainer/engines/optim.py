"""Optimizers for sharded and replicated parameters, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from trainer.schema import Section


class Optim(Section):
    """The encoder's optimizer."""

    name: Literal["sgd", "lars", "adamw"] = Field("sgd", description="Optimizer of the encoder.")
    lr: float = Field(
        0.03, gt=0, description="Peak learning rate per 256 images; it is multiplied by data.batch_size / 256."
    )
    lr_final: float = Field(
        0.0, ge=0, description="Learning rate per 256 images at the last step, reached along half a cosine."
    )
    warmup: float = Field(0.0, ge=0, description="Length of the linear learning-rate warm-up, in epochs.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd and lars; adamw ignores it.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay; lars needs more than 0, however little.")
    decay_norm_and_bias: bool = Field(
        True,
        description="Apply weight decay, and the adaptation of lars, to norms and biases too; false restricts them to "
        "matrices and filters.",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="Number of gradient-accumulation steps: each rank splits its batch into this many micro-batches to "
        "save memory, each with its own batch statistics and batch keys.",
    )
    clip: float | None = Field(None, gt=0, description="Maximum gradient norm (clipping); null for no clipping.")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Layer-wise learning-rate decay of the backbone, for a run that starts from model.weights: each "
        "layer's rate is this times that of the layer above it.",
    )
    frozen_epochs: float = Field(
        0.0,
        ge=0,
        description="Epochs at the start in which the backbone's learning rate is 0 and only projection head and "
        "predictor learn; needs model.weights.",
    )

    @model_validator(mode="after")
    def _final_is_lower(self) -> "Optim":
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final: {self.lr_final} is above optim.lr, {self.lr}")
        return self


def cosine(step: int, steps: int, start: float, final: float, warmup_steps: float = 0) -> float:
    """Return a schedule's value: a linear warm-up from 0 to start, then half a cosine to final at `steps`."""
    if step < warmup_steps:
        return start * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2


def scaled_lr(lr: float, batch_size: int) -> float:
    """Return the learning rate for a batch, given the one for 256 images (linear scaling, arXiv 1706.02677)."""
    return lr * batch_size / 256


def make_optimizer(student: nn.Module, settings: Optim, fused: bool = True) -> torch.optim.Optimizer:
    """Return SGD, LARS or AdamW over the student's parameters. The learning rate is set again at every step.

    Args:
        student: The network.
        settings: Section `optim`.
        fused: Whether AdamW is one operation that can be skipped on the device and captured, like SGD and LARS.

    Raises:
        ValueError: LARS has no weight decay.
    """
    if settings.name == "lars" and not settings.weight_decay:
        raise ValueError(
            "optim.weight_decay: lars adapts what has weight decay; for none give a tiny one, such as 1e-12"
        )
    groups = [part for group in _parameter_groups(student, settings) for part in _split(group)]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused, capturable=fused)
    if settings.name == "lars":
        return Lars(groups, lr=settings.lr, momentum=settings.momentum)
    return Sgd(groups, lr=settings.lr, momentum=settings.momentum)


def _parameter_groups(student: nn.Module, settings: Optim) -> Iterable[dict[str, Any]]:
    """Return the parameters by weight decay and, if the backbone learns at rates of its own, by these."""
    decay, decay_vectors = settings.weight_decay, settings.decay_norm_and_bias
    if settings.layer_decay < 1 or settings.frozen_epochs:
        backbone = backbone_groups(student.get_submodule("backbone"), decay, settings.layer_decay, decay_vectors)
        others = [p for name, p in student.named_parameters() if not name.startswith("backbone.")]
        vectors, matrices = ([p for p in others if (p.dim() < 2) == wanted] for wanted in (True, False))
        return [
            *({**group, "backbone": True} for group in backbone),
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": decay if decay_vectors else 0.0},
        ]
    if decay_vectors:
        return [{"params": list(student.parameters()), "weight_decay": decay}]
    from timm.optim import param_groups_weight_decay  # see models.encoder

    groups: Iterable[dict[str, Any]] = param_groups_weight_decay(student, decay)
    return groups


def backbone_groups(
    backbone: nn.Module, weight_decay: float, layer_decay: float, decay_vectors: bool = False
) -> list[dict[str, Any]]:
    """Return a backbone's parameters by layer, with `lr_scale`, the factor of their learning rate.

    Args:
        backbone: The network.
        weight_decay: Weight decay of matrices and filters.
        layer_decay: Factor of each layer's rate to that of the layer above it; the last layer's is 1.
        decay_vectors: Whether norms and biases have weight decay, too.
    """
    from timm.optim import param_groups_layer_decay  # see models.encoder

    groups = param_groups_layer_decay(
        backbone, weight_decay, weight_decay_exclude_1d=not decay_vectors, layer_decay=layer_decay
    )
    largest = max(group["lr_scale"] for group in groups)
    return [{**group, "lr_scale": group["lr_scale"] / largest} for group in groups]


def set_learning_rates(
    groups: list[dict[str, Any]], lr: float | Tensor, backbone_lr: float | Tensor | None = None
) -> None:
    """Set the rate of an optimizer's groups: `lr`, or `backbone_lr` if given for the backbone's, times `lr_scale`."""
    for group in groups:
        own = lr if backbone_lr is None or "backbone" not in group else backbone_lr
        scale = group.get("lr_scale", 1.0)
        group["lr"] = own if scale == 1 else own * scale


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group into replicated and sharded parameters, which torch's foreach operations do not mix."""
    sharded = [p for p in group["params"] if isinstance(p, DTensor)]
    replicated = [p for p in group["params"] if not isinstance(p, DTensor)]
    return [{**group, "params": params} for params in (replicated, sharded) if params]


def local(x: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory; any other tensor as it is."""
    return x._local_tensor if isinstance(x, DTensor) else x


def shard_group(x: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that hold different shards of a tensor; None if it is replicated."""
    if not isinstance(x, DTensor):
        return None
    (dim,) = (d for d, placement in enumerate(x.placements) if isinstance(placement, Shard))
    return x.device_mesh.get_group(dim)


class FlatLayout(NamedTuple):
    """The layout of parameters in one flat tensor, as ZeRO packs them.

    Attributes:
        tensors: Number of parameters with a shard in this flat tensor on any rank.
        shards: For each shard that this rank holds: the parameter's index, and offset and length in the flat tensor.
        ranks: The ranks that hold the other shards.
    """

    tensors: int
    shards: list[tuple[int, int, int]]
    ranks: dist.ProcessGroup | None


class Sgd(torch.optim.Optimizer):
    """SGD with momentum that updates all parameters of a group in one operation, without a read by the host.

    It differs from torch.optim.SGD(fused=True) in that parameters may be DTensors, of which it updates the local
    shards, and in that the momentum starts at zero, so that the first step can be skipped, too.

    Attributes:
        found_inf: fp32 scalar: 1 skips the step, 0 takes it. None takes every step.
        grad_scale: fp32 scalar that divides the gradients; None divides by nothing. Both attributes have the names of
            those of torch's fused optimizers.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        trained = [p for p in group["params"] if p.grad is not None]
        weights, grads = [local(p) for p in trained], [local(p.grad) for p in trained]
        momenta = [local(self._momentum(p)) for p in trained] if group["momentum"] else []
        self._update(group, weights, grads, momenta, group["weight_decay"])

    def _momentum(self, p: Tensor) -> Tensor:
        """Return a parameter's momentum, zero before the first step."""
        state: dict[str, Tensor] = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor],
        weight_decay: float,
        *,
        unscaled: bool = False,
    ) -> None:
        """Update the weights of a group, which are on one device. `unscaled`: gradients are divided already."""
        if weights:
            torch._fused_sgd_(
                weights,
                grads,
                momenta,
                weight_decay=weight_decay,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                grad_scale=None if unscaled else _on_device(self.grad_scale, weights[0]),
                found_inf=_on_device(self.found_inf, weights[0]),
            )


def _on_device(scalar: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a scalar on another tensor's device: parameters may be offloaded to the host."""
    return None if scalar is None else scalar.to(like.device, non_blocking=True)


class Lars(Sgd):
    """LARS (arXiv 1708.03888): SGD whose step is scaled, tensor by tensor, by eta |w| / |g + decay w|.

    This is the ratio in the code of SimCLR, BYOL and MoCo v3; the paper's has |g| + decay |w| below the line. Groups
    without weight decay take plain SGD steps. Parameters may be sharded: DTensors, or flat tensors whose layout is in
    `layouts`. One reduction per group gives the norms of all tensors.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0, eta: float = 1e-3) -> None:
        super().__init__(params, lr, momentum, weight_decay)
        self.eta = eta
        self.layouts: dict[Tensor, FlatLayout] = {}

    def _step_group(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        indices: list[int] = []  # index of the tensor that each of them is a shard of
        tensors, ranks = 0, None
        for p in group["params"]:
            if p.grad is None:
                continue
            single = FlatLayout(1, [(0, 0, -1)], shard_group(p))
            count, shards, ranks = self.layouts.get(p, single)
            momentum = self._momentum(p) if group["momentum"] else None
            for index, offset, length in shards:
                indices.append(tensors + index)
                for found, x in ((weights, p), (grads, p.grad), (momenta, momentum)):
                    if x is not None:
                        found.append(local(x) if length < 0 else x.narrow(0, offset, length))
            tensors += count
        if not tensors or not group["weight_decay"]:
            self._update(group, weights, grads, momenta, 0.0)
            return
        if weights:
            if (grad_scale := _on_device(self.grad_scale, weights[0])) is not None:
                torch._foreach_div_(grads, grad_scale)
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        ratios = self._ratios(weights, grads, indices, tensors, local(group["params"][0]).device, ranks)
        if weights:
            torch._foreach_mul_(grads, [ratios[index] for index in indices])
        self._update(group, weights, grads, momenta, 0.0, unscaled=True)

    def _ratios(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        indices: list[int],
        tensors: int,
        device: torch.device,
        ranks: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        """Return the factor of each whole tensor's step, scalars on the device."""
        squares = torch.zeros(2, tensors, device=device)
        if weights:
            held = torch.stack([torch.stack(torch._foreach_norm(x)).square() for x in (weights, grads)]).to(squares)
            if indices == list(range(tensors)):
                squares = held
            else:
                squares[:, indices] = held  # of ZeRO's flat tensors; copies the indices to the device
        if ranks is not None:
            dist.all_reduce(squares, group=ranks)
        w_T, g_T = squares.sqrt()
        ratio_T = torch.where((w_T > 0) & (g_T > 0), self.eta * w_T / g_T, 1.0)
        return ratio_T.unbind()
