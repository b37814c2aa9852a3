"""The exchange of images between ranks before the teacher, and the way back for their embeddings.

A teacher that normalises over the same images as the student leaks which key belongs to which query (MoCo, arXiv
1911.05722, sec. 3.3). So the images of each rank are dealt to all ranks, and a key is computed among other images than
its query. MoCo's code all-gathers the whole batch on every rank and selects a part of a permutation. The all-to-all
here sends only the images that a rank uses, which is R times less for R ranks.

The permutation is stratified: each rank shuffles its own images and deals the same number to each rank. The numbers
depend on the sizes only, never on the seed, and a rank needs neither the images nor the order of the others. Where the
number of ranks R divides the batch B of a rank, an image goes to each rank with probability 1/R, as in a permutation
of the global batch. Which images meet differs slightly: two images of one rank meet with probability
(B/R - 1)/(B - 1) and two of different ranks with 1/R, but in a permutation of the global batch any two meet with
(B - 1)/(RB - 1). Where R does not divide B, the remaining B mod R images go to fixed ranks, which are evenly spread and
never the own one.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup


class Shuffle(NamedTuple):
    """The exchange of one rank's images of a global batch, made by `make_shuffle`.

    Attributes:
        send_B: int64 indices of this rank's images in the order of sending, which alone differs from step to step.
        sends: Number of images that go to each rank.
        receives: Number of images that come from each rank.
        order_B: int64 indices of the received images in the order of use; None for the order of receiving.
    """

    send_B: Tensor
    sends: list[int]
    receives: list[int]
    order_B: Tensor | None


def draw_order(local_batch: int, rank: int, world_size: int, seed: int, groups: int = 1) -> NDArray[np.int64]:
    """Draw a rank's part of a stratified permutation of the global batch: `Shuffle.send_B`.

    Groups of a rank that have BatchNorm statistics of their own are treated as ranks with fewer images: several groups
    on one rank exchange what as many ranks exchange.

    Args:
        local_batch: Images of each rank.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the step, the same on all ranks.
        groups: Groups of consecutive images of each rank. Groups of different sizes count as one group.
    """
    layout = _layout(local_batch, groups, rank, world_size)
    groups = layout.groups
    size = local_batch // groups
    drawn_B = np.concatenate(
        [
            group * size + np.random.default_rng((seed, rank * groups + group)).permutation(size)
            for group in range(groups)
        ]
    )
    return drawn_B[layout.take_B]


def make_shuffle(send_B: Tensor, rank: int, world_size: int, groups: int = 1) -> Shuffle:
    """Make the exchange from an order of `draw_order`, on the device of the images. Arguments are those of it."""
    arrangement = len(send_B), groups, rank, world_size
    layout = _layout(*arrangement)
    return Shuffle(send_B, layout.sends, layout.receives, _order(send_B.device, *arrangement))


class _Layout(NamedTuple):
    """The part of an exchange that is the same in all steps; `take_B` sorts this rank's drawn images by destination."""

    groups: int
    take_B: NDArray[np.int64]
    sends: list[int]
    receives: list[int]
    order_B: NDArray[np.int64] | None


@functools.lru_cache(maxsize=16)
def _order(device: torch.device, local_batch: int, groups: int, rank: int, world_size: int) -> Tensor | None:
    """Return `_Layout.order_B` on a device; cached, because the host waits for this copy."""
    order_B = _layout(local_batch, groups, rank, world_size).order_B
    return None if order_B is None else torch.from_numpy(order_B).to(device)


@functools.lru_cache(maxsize=16)
def _layout(local_batch: int, groups: int, rank: int, world_size: int) -> _Layout:
    """Lay out the exchange between all groups, `groups` on each of the ranks, for one rank."""
    if local_batch % groups:
        groups = 1
    size, total = local_batch // groups, world_size * groups
    extra = np.zeros(total, np.int64)  # what remains goes to groups at these distances
    extra[np.arange(size % total) * total // max(size % total, 1)] = 1

    def count(source: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = size // total + extra[(target - source - 1) % total]
        return found

    every, own = np.arange(total), rank * groups + np.arange(groups)
    target_B = np.repeat(np.tile(every, groups), count(own[:, None], every).ravel())
    # Received images are sorted by the rank that sent them, then by the group here, then by the group there.
    receives_RVV = count(every.reshape(world_size, 1, groups), own[:, None])
    group_B = np.repeat(np.broadcast_to(np.arange(groups)[:, None], receives_RVV.shape).ravel(), receives_RVV.ravel())
    return _Layout(
        groups=groups,
        take_B=np.argsort(target_B, kind="stable"),
        sends=np.bincount(target_B // groups, minlength=world_size).tolist(),
        receives=receives_RVV.sum((1, 2)).tolist(),
        order_B=np.argsort(group_B, kind="stable") if min(groups, world_size) > 1 else None,
    )


def shuffle(images: Tensor, route: Shuffle, group: ProcessGroup | None = None) -> Tensor:
    """Exchange images over ranks. Returns the images for this rank's teacher, with shape and memory format of `images`.

    Args:
        images: This rank's images, [B, ...] of any type; each is one block of memory, as in uint8 [B, S, S, 3] or
            channels_last [B, 3, S, S].
        route: The exchange.
        group: Process group; None for the default one.
    """
    size = images[0].numel()
    rows_BN = images.as_strided((len(images), size), (size, 1))
    sent_BN = rows_BN[route.send_B]
    received_BN = torch.empty_like(sent_BN)
    dist.all_to_all_single(received_BN, sent_BN, route.receives, route.sends, group=group)
    if route.order_B is not None:
        received_BN = received_BN[route.order_B]
    return received_BN.as_strided(images.shape, images.stride())


def unshuffle(x_BD: Tensor, route: Shuffle, group: ProcessGroup | None = None) -> Tensor:
    """Send rows computed from shuffled images back to the images' ranks, in the original order."""
    x_BD = x_BD.contiguous()
    if route.order_B is not None:
        x_BD = torch.empty_like(x_BD).index_copy_(0, route.order_B, x_BD)
    returned_BD = torch.empty_like(x_BD)
    dist.all_to_all_single(returned_BD, x_BD, route.sends, route.receives, group=group)
    return torch.empty_like(returned_BD).index_copy_(0, route.send_B, returned_BD)
