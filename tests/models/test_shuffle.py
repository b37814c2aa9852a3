"""The exchange of images over ranks."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.normalize import normalize
from models import adco
from models.batchnorm import group_bn
from models.encoder import Encoder
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
from models.shuffle import Shuffle, draw_order, make_shuffle, shuffle, unshuffle
from tests.ranks import run_ranks
from trainer.plan.collectives import CollectiveTrace

SEED = 7
CPU = torch.device("cpu")


def plan_shuffle(local_batch: int, rank: int, world_size: int, seed: int, groups: int = 1) -> Shuffle:
    send_B = torch.from_numpy(draw_order(local_batch, rank, world_size, seed, groups))
    return make_shuffle(send_B, rank, world_size, groups)


def there_and_back(local_batch: int, kind: str) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """This rank's images, those it got, what came back of the ones it had sent, and its numbers of images to send."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    if kind == "bytes":
        everything = torch.randint(256, (world_size * local_batch, 4, 5, 3), dtype=torch.uint8, generator=generator)
    else:
        everything = torch.rand(world_size * local_batch, 3, 4, 5, generator=generator)
    images = everything[rank * local_batch :][:local_batch].clone()
    if kind == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    route = plan_shuffle(local_batch, rank, world_size, seed=SEED)
    shuffled = shuffle(images, route)
    assert shuffled.stride() == images.stride()
    return images, shuffled, unshuffle(shuffled.flatten(1), route), route.sends


@pytest.mark.parametrize(
    ("world_size", "local_batch", "kind"), [(3, 9, "bytes"), (3, 4, "channels_last"), (2, 1, "contiguous")]
)
def test_images_travel_and_return(world_size: int, local_batch: int, kind: str) -> None:
    ranks = run_ranks(world_size, there_and_back, local_batch, kind)
    everything = torch.cat([images for images, _, _, _ in ranks]).flatten(1)
    found = []
    for rank, (images, shuffled, returned, _) in enumerate(ranks):
        assert torch.equal(returned, images.flatten(1))
        places = (shuffled.flatten(1)[:, None] == everything).all(2).nonzero()[:, 1]
        assert torch.bincount(places // local_batch, minlength=world_size).tolist() == [
            sends[rank] for _, _, _, sends in ranks
        ]
        found += places.tolist()
    assert sorted(found) == list(range(len(everything)))
    assert found != list(range(len(everything)))


SIZES = [(1, 1, 1), (5, 1, 1), (1, 4, 1), (8, 3, 1), (9, 3, 1), (7, 2, 1), (32, 8, 1)]
GROUPED = [(12, 1, 3), (12, 2, 3), (6, 4, 4)]


@pytest.mark.parametrize(("local_batch", "world_size", "groups"), SIZES + GROUPED)
def test_ranks_agree_on_numbers_that_never_change(local_batch: int, world_size: int, groups: int) -> None:
    routes = [plan_shuffle(local_batch, rank, world_size, seed=3, groups=groups) for rank in range(world_size)]
    for rank, route in enumerate(routes):
        assert sum(route.sends) == sum(route.receives) == local_batch
        assert route.receives == [other.sends[rank] for other in routes]
        assert torch.equal(route.send_B.sort().values, torch.arange(local_batch))
        if groups == 1:
            assert max(route.sends) - min(route.sends) <= 1
        if local_batch % world_size == 0:
            assert set(route.sends) == {local_batch // world_size}
        for seed in range(20):
            other = plan_shuffle(local_batch, rank, world_size, seed, groups)
            assert (other.sends, other.receives) == (route.sends, route.receives)


def test_another_seed_or_rank_is_another_order() -> None:
    orders = [plan_shuffle(32, rank, 2, seed).send_B.tolist() for seed in (1, 2**62, 2**62 + 1) for rank in (0, 1)]
    assert len(set(map(tuple, orders))) == 6
    assert torch.equal(plan_shuffle(32, 0, 2, seed=1).send_B, plan_shuffle(32, 0, 2, seed=1).send_B)


@pytest.mark.parametrize(("local_batch", "world_size", "groups"), [(4, 2, 1), (6, 3, 1), (8, 1, 2)])
def test_images_go_everywhere_equally_often_and_all_meet(local_batch: int, world_size: int, groups: int) -> None:
    """Over many seeds: as in a permutation of the global batch; pairs of images meet as the module's text says."""
    trials, total = 2000, world_size * groups
    size = local_batch // groups
    arrived = torch.zeros(trials, total * size, total)  # image, and the group to which it goes
    for seed in range(trials):
        for rank in range(world_size):
            route = plan_shuffle(local_batch, rank, world_size, seed, groups)
            targets = torch.arange(total).repeat_interleave(local_batch // total)
            arrived[seed, rank * local_batch + route.send_B, targets] = 1
    torch.testing.assert_close(arrived.mean(0), torch.full(arrived.shape[1:], 1 / total), rtol=0, atol=0.05)
    meet = torch.einsum("tig,tjg->ij", arrived, arrived) / trials
    owner = torch.arange(total * size) // size
    expected = torch.where(owner[:, None] == owner, (size / total - 1) / (size - 1), 1 / total).fill_diagonal_(1)
    torch.testing.assert_close(meet, expected, rtol=0, atol=0.06)


def shuffled_keys(group: int | None, by_bytes: bool = False) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Keys of this rank's images of 8 by a method with `bn: shuffle`, those without exchange, and the collectives."""
    torch.manual_seed(0)
    student = Encoder("resnet18", dim=8, backbone_args={"channels": (8, 8, 8, 16), "layers": (1, 1, 1, 1)})
    if group:
        group_bn(student, group)
    settings = adco.Settings(bn_group=group)
    bank = Bank(BankSettings(size=8), 8, make_mesh("sharded", CPU, 1))
    method = settings.make(student, bank)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images = images.chunk(world_size)[rank]
    normalized = normalize(images, CPU)
    order_B = torch.from_numpy(method.draw_orders(len(images), 5)[0])
    with CollectiveTrace() as trace:
        if by_bytes:
            keys = method.keys(images, order_B, partial(normalize, device=CPU))
        else:
            keys = method.keys(normalized, order_B)
    calls = [(call.operator, call.dtype) for call in trace.collectives]
    return keys, method.teacher([normalized]), calls  # type: ignore[misc]


def test_keys_of_fewer_ranks_with_groups_are_those_of_several_ranks() -> None:
    several = torch.cat([keys for keys, _, _ in run_ranks(4, shuffled_keys, None)])
    for world_size in (1, 2):
        ranks = run_ranks(world_size, shuffled_keys, 2)
        keys, unshuffled = torch.cat([x for x, _, _ in ranks]), torch.cat([x for _, x, _ in ranks])
        torch.testing.assert_close(keys, several, rtol=1e-4, atol=1e-5)
        assert (keys - unshuffled).abs().max() > 1e-2  # the shuffle changes the groups


def test_images_travel_as_bytes_and_give_the_same_keys_bit_for_bit() -> None:
    for by_bytes, by_floats in zip(
        run_ranks(2, shuffled_keys, None, True), run_ranks(2, shuffled_keys, None), strict=True
    ):
        assert torch.equal(by_bytes[0], by_floats[0])
        assert by_bytes[2] == [("all_to_all", "uint8"), ("all_to_all", "float32")]
