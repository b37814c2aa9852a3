"""The exchange of images over ranks, and BatchNorm over all of them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import adco
from models.batchnorm import group_bn, plan_shuffle, shuffle, synchronise_bn, unshuffle
from models.encoder import Encoder
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
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


def make_network(momentum: float = 0.3, rows: bool = False) -> nn.Module:
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if rows else nn.BatchNorm2d
    network = nn.Sequential(kind(3, eps=1e-3, momentum=momentum), nn.ReLU())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.rand(p.shape))
    return network


def make_images(rows: bool = False) -> Tensor:
    """Or, as a head sees them, rows of features."""
    # Brighter and of less contrast than a normal distribution: the variance is a small part of the mean square.
    images = 2 + 0.5 * torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return images[:, :, 0, 0] if rows else images


def run_network(network: nn.Module, x: Tensor, first_row: int) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step on a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = network(x)
    weights = torch.arange(first_row * y[0].numel(), (first_row + len(y)) * y[0].numel()).view(y.shape).sin()
    (weights * y).sum().backward()
    assert x.grad is not None
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(network.named_buffers())}


def run_synchronised(momentum: float, rows: bool) -> dict[str, Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    network = synchronise_bn(make_network(momentum, rows), torch.device("cpu"))
    assert type(network[0]) not in (nn.BatchNorm1d, nn.BatchNorm2d)  # type: ignore[index]
    x = make_images(rows).chunk(world_size)[rank]
    got = run_network(network, x, first_row=rank * len(x))
    for name, value in got.items():
        if name.startswith("gradient"):
            dist.all_reduce(value)
    return got


@pytest.mark.parametrize(("momentum", "rows"), [(0.3, False), (0.0, False), (0.3, True)])  # 0: the teacher's
def test_synchronised_batchnorm_is_batchnorm_of_the_global_batch(momentum: float, rows: bool) -> None:
    ranks = run_ranks(2, run_synchronised, momentum, rows)
    expected = run_network(make_network(momentum, rows), make_images(rows), first_row=0)
    assert {"y", "dx", "gradient of 0.weight", "gradient of 0.bias", "0.running_mean", "0.running_var"} < set(expected)
    for name in ("y", "dx"):
        torch.testing.assert_close(
            torch.cat([rank.pop(name) for rank in ranks]), expected.pop(name), rtol=1e-5, atol=1e-5
        )
    for rank in ranks:
        torch.testing.assert_close(rank, expected, rtol=1e-5, atol=1e-5)


def run_grouped(momentum: float, rows: bool, group: int) -> dict[str, Tensor]:
    """One step on this rank's share of the images; gradients and buffers as after averaging over ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    network = group_bn(make_network(momentum, rows), group)
    x = make_images(rows).chunk(world_size)[rank]
    got = run_network(network, x, first_row=rank * len(x))
    for name, value in got.items():
        if name.startswith("gradient"):
            dist.all_reduce(value)
        elif "running" in name:
            dist.all_reduce(value)
            value /= world_size
    return got


@pytest.mark.parametrize(("momentum", "rows"), [(0.3, False), (0.0, False), (0.3, True)])
def test_groups_on_one_rank_are_the_batches_of_several(momentum: float, rows: bool) -> None:
    plain, grouped, whole = (
        run_ranks(world_size, run_grouped, momentum, rows, group) for world_size, group in ((4, 2), (1, 2), (1, 8))
    )
    (one,) = grouped
    for name in ("y", "dx"):
        torch.testing.assert_close(one.pop(name), torch.cat([rank.pop(name) for rank in plain]))
    torch.testing.assert_close(one, plain[0])
    expected = run_network(make_network(momentum, rows), make_images(rows), first_row=0)
    torch.testing.assert_close(whole[0], expected)  # a group of all images is plain BatchNorm
    if momentum:
        assert not torch.allclose(one["0.running_var"], expected["0.running_var"])


def test_grouped_batchnorm_keeps_the_memory_format_and_refuses_other_kinds() -> None:
    network = group_bn(make_network(), 4)
    images = make_images().contiguous(memory_format=torch.channels_last)
    whole = network(images)
    thirds = group_bn(make_network(), 3)(images)  # groups of 3, 3 and 2 of 8 images
    torch.testing.assert_close(thirds[6:], make_network()(images[6:]))
    assert whole.shape == thirds.shape
    assert network(images).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"bn_group: needs nn\.BatchNorm1d or nn\.BatchNorm2d, got BatchNorm3d"):
        group_bn(nn.Sequential(nn.BatchNorm3d(4)), 2)


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


def evaluate_synchronised() -> tuple[Tensor, Tensor]:
    plain = make_network().eval().requires_grad_(False)
    synchronised = synchronise_bn(make_network(), torch.device("cpu")).eval().requires_grad_(False)
    return plain(make_images()), synchronised(make_images())


def test_synchronised_batchnorm_evaluates_as_plain() -> None:
    for plain, synchronised in run_ranks(2, evaluate_synchronised):
        assert torch.equal(plain, synchronised)


def test_other_batchnorms_are_not_synchronised_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"sync on a CPU needs nn\.BatchNorm1d or nn\.BatchNorm2d, got BatchNorm3d"):
        synchronise_bn(nn.Sequential(nn.BatchNorm3d(4)), torch.device("cpu"))
