"""BatchNorm of parts of a batch and across ranks: groups, the shuffle for the teacher, and the global batch.

A teacher that normalises over the same images as the student leaks which key belongs to which query (MoCo, arXiv
1911.05722, sec. 3.3). `shuffle` sends each image to the rank that a permutation of the global batch chooses, so a key
is computed among other images than its query. MoCo's code all-gathers the whole batch on every rank and selects a part;
the all-to-all here sends only the images that a rank uses, which is R times less for R ranks.
"""

import functools
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class Shuffle(NamedTuple):
    """The exchange of one rank's images of a global batch, made by `plan_shuffle`; all on the host.

    Attributes:
        send_B: int64 indices of this rank's images in the order of sending.
        sends: Number of images that go to each rank.
        receives: Number of images that come from each rank.
    """

    send_B: Tensor
    sends: list[int]
    receives: list[int]


def plan_shuffle(local_batch: int, rank: int, world_size: int, seed: int) -> Shuffle:
    """Draw a random permutation of the global batch, cut into equal parts, one for each rank.

    Args:
        local_batch: Images of each rank.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the permutation, the same on all ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted_RB = torch.randperm(world_size * local_batch, generator=generator).view(world_size, local_batch)
    owner_RB = wanted_RB // local_batch
    send_B = wanted_RB[owner_RB == rank] - rank * local_batch
    sends = (owner_RB == rank).sum(1).tolist()
    receives = torch.bincount(owner_RB[rank], minlength=world_size).tolist()
    return Shuffle(send_B, sends, receives)


def shuffle(images_BCHW: Tensor, route: Shuffle, group: ProcessGroup | None = None) -> Tensor:
    """Exchange images over ranks. Returns the images for this rank's teacher, of the same shape, in channels_last."""
    rows_BHWC = images_BCHW.permute(0, 2, 3, 1)  # the memory order of channels_last, so nothing is copied
    # non_blocking, here and below: otherwise the host waits for all work that the device has been given before.
    sent_BHWC = rows_BHWC[route.send_B.to(rows_BHWC.device, non_blocking=True)].contiguous()
    received_BHWC = torch.empty_like(sent_BHWC)
    dist.all_to_all_single(received_BHWC, sent_BHWC, route.receives, route.sends, group=group)
    return received_BHWC.permute(0, 3, 1, 2)


def unshuffle(x_BD: Tensor, route: Shuffle, group: ProcessGroup | None = None) -> Tensor:
    """Send rows computed from shuffled images back to the images' ranks, in the original order."""
    returned_BD = torch.empty_like(x_BD, memory_format=torch.contiguous_format)
    dist.all_to_all_single(returned_BD, x_BD.contiguous(), route.sends, route.receives, group=group)
    restored_BD = torch.empty_like(returned_BD)
    restored_BD[route.send_B.to(x_BD.device, non_blocking=True)] = returned_BD
    return restored_BD


def synchronise_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm of the model normalise over the global batch.

    A GPU uses torch's SyncBatchNorm, which does not run on a CPU; a CPU uses `_SyncBatchNormCPU`.
    """
    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            synced = _SyncBatchNormCPU(child.num_features, child.eps, child.momentum, child.affine)
            synced.load_state_dict(child.state_dict())
            setattr(model, name, synced)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            kind = type(child).__name__
            raise ValueError(f"method.bn: sync on a CPU needs nn.BatchNorm1d or nn.BatchNorm2d, got {kind}")
        else:
            synchronise_bn(child, device)
    return model


def group_bn(model: nn.Module, group: int) -> nn.Module:
    """Make every BatchNorm normalise over groups of at most `group` consecutive images instead of the whole batch.

    Groups are as equal as possible.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            setattr(model, name, _GroupBatchNorm(child, group))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            kind = type(child).__name__
            raise ValueError(f"method.bn_group: needs nn.BatchNorm1d or nn.BatchNorm2d, got {kind}")
        else:
            group_bn(child, group)
    return model


class _GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over groups of images: a rank computes what several ranks with fewer images compute.

    The running statistics move as the mean of those of ranks with one group each (SplitBatchNorm in the CIFAR
    demonstration of github.com/facebookresearch/moco).
    """

    def __init__(self, like: nn.modules.batchnorm._BatchNorm, group: int) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, like.affine)
        self.load_state_dict(like.state_dict())
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.group:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        parts = x.tensor_split(-(-len(x) // self.group))
        means_GC, variances_GC = (s.repeat(len(parts), 1) for s in (self.running_mean, self.running_var))
        normalised = [
            F.batch_norm(part, mean_C, variance_C, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean_C, variance_C in zip(parts, means_GC, variances_GC, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means_GC.mean(0))
            self.running_var.copy_(variances_GC.mean(0))
            self.num_batches_tracked.add_(1)
        return torch.cat(normalised)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape."""


class _AllReduceSum(torch.autograd.Function):
    """Sums over ranks; the gradient is summed over ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _SyncBatchNormCPU(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of rows [N, C] or images [N, C, H, W] over the batches of all ranks, which must have equal sizes.

    Sums are in fp32. The variance is a second sum, around the mean: E[x^2] - E[x]^2 would lose most of its digits where
    the mean is large compared with the standard deviation.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()
        rows = x.numel() // x.shape[1] * dist.get_world_size()
        axes = [0, *range(2, x.dim())]
        channels = [1, -1, *[1] * (x.dim() - 2)]
        mean = _AllReduceSum.apply(x.sum(axes)) / rows
        centred = x - mean.view(channels)
        variance = _AllReduceSum.apply(centred.square().sum(axes)) / rows
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centred * scale.view(channels)).to(dtype)
        return (centred * (self.weight * scale).view(channels) + self.bias.view(channels)).to(dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape."""


def stop_counting(network: nn.Module) -> None:
    """Let BatchNorms stop counting batches: nobody reads the counters, and each takes a launch per layer and view.

    The counters stay in the network's state_dict, with the values that they have now or that a checkpoint writes into
    them. The network then takes no load_state_dict.
    """
    for module in network.modules():
        # Others may need their counter, as torch's SyncBatchNorm does, or a BatchNorm that averages over all batches.
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d) and module.momentum is not None:
            counter = module._buffers["num_batches_tracked"]
            module._buffers["num_batches_tracked"] = None
            if counter is not None:
                module.register_state_dict_post_hook(functools.partial(_add_counter, counter))


def _add_counter(counter: Tensor, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Add a BatchNorm's counter to its state_dict, as a hook."""
    state[f"{prefix}num_batches_tracked"] = counter
