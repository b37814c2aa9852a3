"""The exchange of images over ranks, and BatchNorm over all of them."""

import torch
import torch.distributed as dist
from torch import Tensor

from models.shuffle_bn import plan, shuffle, unshuffle
from tests.ranks import run_ranks


def there_and_back(local_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.arange(local_batch)[:, None] + rank * local_batch + torch.zeros(1, 3)
    route = plan(local_batch, rank, world, seed=7)
    shuffled = shuffle(x, route)
    return x, shuffled, unshuffle(shuffled, route)


def test_images_travel_and_return() -> None:
    ranks = run_ranks(3, there_and_back, 8)
    everything = torch.cat([x for x, _, _ in ranks])
    travelled = torch.cat([shuffled for _, shuffled, _ in ranks])
    assert not torch.equal(travelled, everything)
    assert torch.equal(travelled.sort(0).values, everything)
    for x, _, returned in ranks:
        assert torch.equal(x, returned)
