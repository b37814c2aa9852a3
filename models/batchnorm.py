"""BatchNorm over groups of a rank's images, and over the batches of all ranks."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of the model normalise over the batches of all ranks, which have equal sizes. Collective.

    Names and values of parameters and buffers stay. The layers communicate in a process group of their own: in that of
    DDP, their small sums would queue behind the gradients that are reduced at the same time.

    Args:
        model: The model, which is changed.
        device: Where it will run; on a GPU the group is NCCL's.

    Raises:
        ValueError: A BatchNorm is of another kind than `replace_bn` knows.
    """
    backend = "nccl" if device.type == "cuda" else None  # None: that of the default group
    group = dist.new_group(backend=backend, timeout=timedelta(minutes=30))
    assert isinstance(group, ProcessGroup)
    return replace_bn(model, "method.bn: sync", lambda norm: SyncBatchNorm(norm, group))


def group_bn(model: nn.Module, group: int) -> nn.Module:
    """Make every BatchNorm normalise over groups of at most `group` consecutive images instead of the whole batch.

    Groups are as equal as possible. Names and values of parameters and buffers stay.
    """
    return replace_bn(model, "method.bn_group:", lambda norm: GroupBatchNorm(norm, group))


def replace_bn(model: nn.Module, key: str, replace: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Replace every BatchNorm inside the model by `replace(BatchNorm)`.

    Raises:
        ValueError: A BatchNorm is neither nn.BatchNorm1d, nn.BatchNorm2d nor timm's BatchNormAct2d, or has no running
            statistics with a fixed momentum; the message starts with `key`.
    """
    for name, child in model.named_children():
        if not isinstance(child, _BatchNorm):
            replace_bn(child, key, replace)
        elif type(child) not in _kinds():
            kind = type(child).__name__
            raise ValueError(f"{key} needs nn.BatchNorm1d, nn.BatchNorm2d or timm's BatchNormAct2d, got {kind}")
        elif not child.track_running_stats or child.momentum is None:
            raise ValueError(f"{key} needs BatchNorm with running statistics and a momentum, got {child}")
        else:
            setattr(model, name, replace(child))
    return model


@functools.cache
def _kinds() -> tuple[type[_BatchNorm], ...]:
    from timm.layers import BatchNormAct2d  # see models.encoder

    return nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d


def stop_counting(network: nn.Module) -> None:
    """Let BatchNorms stop counting batches: nobody reads the counters, and each takes a launch per layer and view.

    The counters stay in the network's state_dict, with the values that they have now or that a checkpoint writes into
    them. The network then takes no load_state_dict.
    """
    for module in network.modules():
        # Others may need their counter, as torch's SyncBatchNorm does, or a BatchNorm that averages over all batches.
        if type(module) in (*_kinds(), SyncBatchNorm, GroupBatchNorm) and module.momentum is not None:
            counter = module._buffers["num_batches_tracked"]
            module._buffers["num_batches_tracked"] = None
            if counter is not None:
                module.register_state_dict_post_hook(functools.partial(_add_counter, counter))


def _add_counter(counter: Tensor, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Add a BatchNorm's counter to its state_dict, as a hook."""
    state[f"{prefix}num_batches_tracked"] = counter


class _BatchNormLike(_BatchNorm):
    """A BatchNorm that takes over parameters, buffers and mode of another, and the activation of a BatchNormAct2d.

    A subclass computes the output and the running statistics of training in `normalize`.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise rows [B, C] or images [B, C, H, W]."""
        if self.training and self.differs(x):
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            x = self.normalize(x)
        else:
            x = super().forward(x)
        for layer in self._modules.values():  # dropout and activation of a BatchNormAct2d
            assert layer is not None
            x = layer(x)
        return x

    def differs(self, x: Tensor) -> bool:
        """Return whether the statistics of `x` are not those of plain BatchNorm."""
        raise NotImplementedError

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise by the batch's statistics and update the running ones."""
        raise NotImplementedError

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape."""


class GroupBatchNorm(_BatchNormLike):
    """BatchNorm over groups of images: a rank computes what several ranks with fewer images compute.

    The running statistics move as the mean of those of ranks with one group each (SplitBatchNorm in the CIFAR
    demonstration of github.com/facebookresearch/moco).
    """

    def __init__(self, norm: _BatchNorm, group: int) -> None:
        """Replaces `norm`; `group` is the largest number of images in a group."""
        super().__init__(norm)
        self.group = group

    def differs(self, x: Tensor) -> bool:
        """See `_BatchNormLike.differs`."""
        return len(x) > self.group

    def normalize(self, x: Tensor) -> Tensor:
        """See `_BatchNormLike.normalize`."""
        assert self.momentum is not None
        groups = -(-len(x) // self.group)
        small, larger = divmod(len(x), groups)
        sizes = [small + (i < larger) for i in range(groups)]
        # Moving averages with these momenta, one after the other, give each group the same weight, together `momentum`.
        momenta = [self.momentum / (groups - left * self.momentum) for left in reversed(range(groups))]
        y: Tensor = _NormalizeGroups.apply(
            x.contiguous(memory_format=_memory_format(x)),
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            sizes,
            momenta,
            self.eps,
        )
        return y


class _NormalizeGroups(torch.autograd.Function):
    """Normalises groups of images by torch's BatchNorm kernels, which write into one output.

    By operators that autograd knows, each direction would copy all groups, and the backward pass would add up as many
    tensors of the size of the input as there are groups.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        running_mean_C: Tensor,
        running_var_C: Tensor,
        sizes: list[int],
        momenta: list[float],
        eps: float,
    ) -> Tensor:
        y = torch.empty_like(x)
        means_GC, scales_GC = running_mean_C.new_empty(2, len(sizes), x.shape[1])
        for own, out, mean_C, scale_C, momentum in zip(
            x.split(sizes), y.split(sizes), means_GC, scales_GC, momenta, strict=True
        ):
            torch.native_batch_norm(
                own, weight_C, bias_C, running_mean_C, running_var_C, True, momentum, eps,
                out=(out, mean_C, scale_C),
            )  # fmt: skip
        ctx.save_for_backward(x, weight_C, means_GC, scales_GC)
        ctx.sizes, ctx.eps = sizes, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, means_GC, scales_GC = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_memory_format(x))
        wanted = [ctx.needs_input_grad[0], weight_C is not None, weight_C is not None]
        gradients = [
            torch.ops.aten.native_batch_norm_backward(
                own_dy, own, weight_C, None, None, mean_C, scale_C, True, ctx.eps, wanted
            )
            for own_dy, own, mean_C, scale_C in zip(
                dy.split(ctx.sizes), x.split(ctx.sizes), means_GC, scales_GC, strict=True
            )
        ]
        dx, d_weight_C, d_bias_C = zip(*gradients, strict=True)
        affine: tuple[Tensor | None, ...] = (None, None)
        if weight_C is not None:
            affine = torch.stack([*d_weight_C, *d_bias_C]).view(2, len(ctx.sizes), -1).sum(1).unbind()
        return (torch.cat(dx) if wanted[0] else None, *affine, *[None] * 5)


class SyncBatchNorm(_BatchNormLike):
    """BatchNorm over the batches of all ranks, which must have equal sizes; on a GPU and on a CPU.

    torch's SyncBatchNorm allows ranks of different sizes. It runs on GPUs only, and to skip empty ranks it indexes by a
    mask, for which the host waits three times a call. Here each direction is one all-reduce of [2, C], and nothing
    waits. All operators work in the type of `x`, with sums in fp32, and torch.compile fuses them.
    """

    def __init__(self, norm: _BatchNorm, group: ProcessGroup) -> None:
        """Replaces `norm`; the batch is that of all ranks of `group`."""
        super().__init__(norm)
        self.group, self.ranks = group.group_name, group.size()  # a name can be copied with the module

    def differs(self, x: Tensor) -> bool:
        """See `_BatchNormLike.differs`."""
        return self.ranks > 1

    def normalize(self, x: Tensor) -> Tensor:
        """See `_BatchNormLike.normalize`."""
        assert self.running_mean is not None
        assert self.running_var is not None
        x = x.contiguous(memory_format=_memory_format(x))
        mean_C, variance_C = self._global_statistics(x.detach())
        if self.momentum:  # a teacher has 0
            rows = x.numel() // x.shape[1] * self.ranks
            with torch.no_grad():
                self.running_mean.lerp_(mean_C, self.momentum)
                self.running_var.lerp_(variance_C * (rows / (rows - 1)), self.momentum)
        y: Tensor = _NormalizeGlobally.apply(
            x, self.weight, self.bias, mean_C, variance_C, self.eps, self.group, self.ranks
        )
        return y

    def _global_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the biased variance of the global batch, [C] each, in the running statistics' type.

        Each rank's own statistics are computed in two passes. E[x^2] = variance + mean^2 of the ranks is averaged in
        fp64, so that subtracting the square of the global mean loses no digit that fp32 had.
        """
        like_C = self.running_mean  # for its type: its values enter only the output, which is not used
        _, own_mean_C, own_scale_C = torch.native_batch_norm(x, like_C, like_C, None, None, True, 0.0, self.eps)
        own_2C = torch.stack([own_mean_C, own_scale_C]).double()
        own_2C[1].pow_(-2).addcmul_(own_2C[0], own_2C[0])  # now the mean, and variance + eps + mean^2
        global_2C = _sum_over_ranks(own_2C, self.group) / self.ranks
        global_2C[1].addcmul_(global_2C[0], global_2C[0], value=-1).sub_(self.eps).clamp_(min=0)
        mean_C, variance_C = global_2C.to(own_mean_C.dtype)
        return mean_C, variance_C


class _NormalizeGlobally(torch.autograd.Function):
    """Normalises by the statistics of the global batch; the gradient passes through them.

    With dy the gradient of the output, u the normalised input, and E the mean over the global batch, the gradient of
    the input is weight / sqrt(variance + eps) * (dy - E[dy] - u E[dy u]) (Ioffe and Szegedy, arXiv 1502.03167, sec. 3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        mean_C: Tensor,
        variance_C: Tensor,
        eps: float,
        group: str,
        ranks: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_C, mean_C, variance_C)
        ctx.eps, ctx.group, ctx.ranks = eps, group, ranks
        return F.batch_norm(x, mean_C, variance_C, weight_C, bias_C, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, variance_C = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_memory_format(x))
        scale_C = torch.rsqrt(variance_C + ctx.eps)
        # This rank's sums of dy u and dy, which are the gradients of weight and bias. The third argument is a weight,
        # on which these do not depend; on a GPU there must be one.
        _, dy_u_C, dy_C = torch.ops.aten.native_batch_norm_backward(
            dy, x, mean_C, None, None, mean_C, scale_C, True, ctx.eps, [False, True, True]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            mean_dy_C, mean_dy_u_C = _sum_over_ranks(torch.stack([dy_C, dy_u_C]), ctx.group) / (
                x.numel() // x.shape[1] * ctx.ranks
            )
            if weight_C is not None:
                scale_C = scale_C * weight_C
            dx = F.batch_norm(
                x, mean_C, variance_C, -scale_C * mean_dy_u_C, -scale_C * mean_dy_C, False, 0.0, ctx.eps
            ).addcmul_(dy, scale_C.view(-1, *[1] * (x.dim() - 2)))
        affine = (dy_u_C, dy_C) if weight_C is not None else (None, None)
        return dx, *affine, None, None, None, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """Return the sum of `x` over the ranks of the group of this name, by operators that torch.compile can trace."""
    total: Tensor = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
    return total
