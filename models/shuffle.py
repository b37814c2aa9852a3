"""The exchange of images between ranks before the teacher, and the way back for their embeddings.

A teacher that normalises over the same images as the student leaks which key belongs to which query (MoCo, arXiv
1911.05722, sec. 3.3). `shuffle` sends each image to the rank that a permutation of the global batch chooses, so a key
is computed among other images than its query. MoCo's code all-gathers the whole batch on every rank and selects a part;
the all-to-all here sends only the images that a rank uses, which is R times less for R ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
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
