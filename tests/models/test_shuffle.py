"""The exchange of images over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models import adco
from models.batchnorm import group_bn
from models.encoder import Encoder
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
from models.shuffle import plan_shuffle, shuffle, unshuffle
from tests.ranks import run_ranks

SEED = 7


def there_and_back(local_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's images, those it got, and what came back of the ones it had sent, flattened as embeddings are."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everything = torch.rand(world_size * local_batch, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images = everything[rank * local_batch :][:local_batch].contiguous(memory_format=torch.channels_last)
    route = plan_shuffle(local_batch, rank, world_size, seed=SEED)
    shuffled = shuffle(images, route)
    assert shuffled.is_contiguous(memory_format=torch.channels_last)
    return images, shuffled, unshuffle(shuffled.flatten(1), route)


def in_order(images: Tensor) -> Tensor:
    """Sorted by their first pixel, which tells them apart."""
    return images[images[:, 0, 0, 0].argsort()]


def test_images_travel_and_return() -> None:
    ranks = run_ranks(3, there_and_back, 8)
    everything = torch.cat([images for images, _, _ in ranks])
    travelled = torch.cat([shuffled for _, shuffled, _ in ranks])
    assert not torch.equal(travelled, everything)
    assert torch.equal(in_order(travelled), in_order(everything))
    for images, _, returned in ranks:
        assert torch.equal(returned, images.flatten(1))

    # Each rank got its part of the permuted global batch. BatchNorm does not ask for the order of batch mates.
    permuted = everything[torch.randperm(24, generator=torch.Generator().manual_seed(SEED))]
    for part, (_, shuffled, _) in zip(permuted.chunk(3), ranks, strict=True):
        assert torch.equal(in_order(shuffled), in_order(part))


@pytest.mark.parametrize(("local_batch", "world_size"), [(1, 1), (5, 1), (1, 4), (8, 3), (32, 8)])
def test_ranks_agree_on_who_sends_what(local_batch: int, world_size: int) -> None:
    routes = [plan_shuffle(local_batch, rank, world_size, seed=3) for rank in range(world_size)]
    for rank, route in enumerate(routes):
        assert sum(route.sends) == sum(route.receives) == local_batch
        assert route.receives == [other.sends[rank] for other in routes]
        assert torch.equal(route.send_B.sort().values, torch.arange(local_batch))


def test_another_seed_is_another_exchange() -> None:
    assert not torch.equal(plan_shuffle(32, 0, 2, seed=1).send_B, plan_shuffle(32, 0, 2, seed=2).send_B)
    assert torch.equal(plan_shuffle(32, 0, 2, seed=1).send_B, plan_shuffle(32, 0, 2, seed=1).send_B)


def shuffled_keys(group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's images of 8, their keys of a method with `bn: shuffle`, and the running variance."""
    torch.manual_seed(0)
    student = Encoder("resnet18", dim=8, backbone_args={"channels": (8, 8, 8, 16), "layers": (1, 1, 1, 1)})
    if group:
        group_bn(student, group)
    settings = adco.Settings(bn_group=group)
    bank = Bank(BankSettings(size=8), 8, make_mesh("sharded", torch.device("cpu"), 1))
    method = settings.make(student, bank)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)).chunk(world_size)[rank]
    return images, method.keys(images, seed=5), method.teacher([images])  # type: ignore[misc]


def test_keys_of_one_rank_with_groups_are_those_of_several_ranks() -> None:
    several, ((_, keys, unshuffled),) = run_ranks(4, shuffled_keys, None), run_ranks(1, shuffled_keys, 2)
    torch.testing.assert_close(keys, torch.cat([k for _, k, _ in several]), rtol=1e-4, atol=1e-5)
    assert (keys - unshuffled).abs().max() > 1e-2  # the shuffle changes the groups
