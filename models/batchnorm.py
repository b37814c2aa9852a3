"""What keeps BatchNorm from leaking which key belongs to which query (MoCo, arXiv 1911.05722, sec. 3.3).

A teacher that normalises over the same images as the student gives the answer away. `shuffle`
sends each image to a rank chosen by a permutation of the global batch, so that a key is made among
other batch mates. The reference implementation all-gathers the whole batch to every rank and picks
its share; the all-to-all here moves only the images a rank will use, which is R times less.
"""

from typing import Any, NamedTuple

import timm.layers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


class Shuffle(NamedTuple):
    """How one rank's share of a global batch travels, from `plan`; all on the host.

    send_B: int64, this rank's samples in the order they leave. sends, receives: how many go to and
    come from each rank.
    """

    send_B: Tensor
    sends: list[int]
    receives: list[int]


def plan(local_batch: int, rank: int, world_size: int, seed: int) -> Shuffle:
    """A random exchange of samples, the same permutation on every rank for the same seed.

    The permuted global batch is cut into equal parts, one a rank, as in the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted_RB = torch.randperm(world_size * local_batch, generator=generator).view(world_size, local_batch)
    owner_RB = wanted_RB // local_batch
    send_B = wanted_RB[owner_RB == rank] - rank * local_batch
    sends = (owner_RB == rank).sum(1).tolist()
    receives = torch.bincount(owner_RB[rank], minlength=world_size).tolist()
    return Shuffle(send_B, sends, receives)


def shuffle(images_BCHW: Tensor, route: Shuffle, group: ProcessGroup | None = None) -> Tensor:
    """Exchange images over ranks: those that this rank's teacher will see, same shape and type, channels_last."""
    rows_BHWC = images_BCHW.permute(0, 2, 3, 1)  # the order of the bytes in channels_last: nothing is copied
    # non_blocking, here and below: else the host waits until the device has done all that it was given before.
    sent_BHWC = rows_BHWC[route.send_B.to(rows_BHWC.device, non_blocking=True)].contiguous()
    received_BHWC = torch.empty_like(sent_BHWC)
    dist.all_to_all_single(received_BHWC, sent_BHWC, route.receives, route.sends, group=group)
    return received_BHWC.permute(0, 3, 1, 2)


def unshuffle(x_BD: Tensor, route: Shuffle, group: ProcessGroup | None = None) -> Tensor:
    """Send the rows made from shuffled images back to where those came from, in the original order."""
    returned_BD = torch.empty_like(x_BD, memory_format=torch.contiguous_format)
    dist.all_to_all_single(returned_BD, x_BD.contiguous(), route.sends, route.receives, group=group)
    restored_BD = torch.empty_like(returned_BD)
    restored_BD[route.send_B.to(x_BD.device, non_blocking=True)] = returned_BD
    return restored_BD


def synchronise_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """Every BatchNorm of the model normalises over the global batch.

    On a GPU by torch's SyncBatchNorm, which does not run on a CPU; there by `_SyncBatchNormCPU`.
    """
    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            synced = _SyncBatchNormCPU(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(model, name, synced)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            kind = type(child).__name__
            raise ValueError(f"method.bn: sync on a CPU needs nn.BatchNorm1d or nn.BatchNorm2d, got {kind}")
        else:
            synchronise_bn(child, device)
    return model


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks."""

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
    """BatchNorm of rows [N, C] or images [N, C, H, W] over all ranks' batches, by two sums per channel in fp32.

    All ranks hold equally many rows.

    The variance is that around the mean, a second sum: as E[x^2] - E[x]^2 it would lose most of its digits
    where the mean is large against it.
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
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(channels) + self.bias.view(channels)).to(dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape."""
