"""BatchNorm over groups of a rank's images, and over the batches of all ranks."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from models.batchnorm import SyncBatchNorm, group_bn, stop_counting, synchronise_bn
from models.teacher import make_teacher
from tests.ranks import run_ranks
from trainer.plan.collectives import CollectiveTrace
from trainer.plan.trace import OperatorEvent, StepTrace

CPU = torch.device("cpu")


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


# The global batch

KINDS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether it normalises rows
    "images": (lambda: nn.BatchNorm2d(3, eps=1e-3, momentum=0.3), False),
    "rows": (lambda: nn.BatchNorm1d(3), True),
    "without scale and bias": (lambda: nn.BatchNorm1d(3, affine=False), True),
    "teacher": (lambda: nn.BatchNorm2d(3, momentum=0.0), False),
    "with activation": (lambda: BatchNormAct2d(3), False),
}


def global_batch(rows: bool, dtype: torch.dtype) -> Tensor:
    """12 images, or rows, of another brightness and contrast on each rank."""
    scale = torch.linspace(0.5, 2, 12).view(-1, 1, 1, 1)
    images = 2 * scale + scale * torch.rand(12, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    images = images.to(dtype, memory_format=torch.channels_last)
    return images[:, :, 0, 0].contiguous() if rows else images


def run_kinds(dtype: torch.dtype) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return for each kind a step of this rank and one of plain BatchNorm on the global batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = {}
    for kind, (make, rows) in KINDS.items():
        plain = nn.Sequential(make()).to(dtype)
        with torch.no_grad():
            for i, p in enumerate(plain.parameters()):
                p.add_(torch.tensor([0.1, 0.3, -1.5]) + i)
        synchronised = copy.deepcopy(synchronise_bn(copy.deepcopy(plain), CPU))  # a teacher is a copy of the student
        assert isinstance(synchronised[0], SyncBatchNorm)  # type: ignore[index]
        assert synchronised.state_dict().keys() == plain.state_dict().keys()
        x = global_batch(rows, dtype)
        mine = x.chunk(world_size)[rank]
        got = run_network(synchronised, mine, first_row=rank * len(mine))
        expected = run_network(plain, x, first_row=0)
        for name in ("y", "dx"):
            assert got[name].stride() == mine.stride()
            expected[name] = expected[name].chunk(world_size)[rank]
        for name, value in got.items():
            if name.startswith("gradient"):
                dist.all_reduce(value)
        found[kind] = got, expected
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_synchronised_batchnorm_is_batchnorm_of_the_global_batch(world_size: int) -> None:
    for rank in run_ranks(world_size, run_kinds, torch.float64):
        assert "gradient of 0.weight" in rank["images"][0]
        for kind, (got, expected) in rank.items():
            for name, value in got.items():
                torch.testing.assert_close(value, expected.pop(name), rtol=1e-11, atol=1e-11, msg=f"{kind}: {name}")
            assert not expected


@torch.no_grad()
def run_offset(offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """The error of plain BatchNorm of the global batch in fp32, and that of this rank's part, and its variance."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(64, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + offset
    truth = nn.BatchNorm2d(4).double()(x.double())
    plain = (nn.BatchNorm2d(4)(x) - truth).abs().max()
    network = synchronise_bn(nn.Sequential(nn.BatchNorm2d(4, momentum=1.0)), CPU)
    error = (network(x.chunk(world_size)[rank]) - truth.chunk(world_size)[rank]).abs().max()
    variance = x.double().var((0, 2, 3))
    return plain, error, (network[0].running_var / variance - 1).abs().max()  # type: ignore[index]


@pytest.mark.parametrize("offset", [1.0, 1e4])
def test_a_mean_far_from_zero_costs_no_more_than_in_plain_batchnorm(offset: float) -> None:
    for plain, error, variance_error in run_ranks(2, run_offset, offset):
        assert error < 3 * plain + 2e-7 * offset  # that the mean is rounded to fp32 costs up to 6e-8 * offset
        assert variance_error < 1e-5


def run_autocast(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradient of one of two equal halves in a low precision, and the running variance."""
    network = synchronise_bn(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=1.0)), CPU)
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(4, 3)[..., None, None])  # type: ignore[index]
    x = global_batch(rows=False, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = network(x)
    y.square().sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    return y.detach(), x.grad, network[1].running_var  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32_under_autocast(dtype: torch.dtype) -> None:
    x = global_batch(rows=False, dtype=torch.float32)
    rounded = torch.cat([x, x]).to(dtype).double()
    for y, dx, variance in run_ranks(2, run_autocast, dtype):
        torch.testing.assert_close(variance[:3].double(), rounded.var((0, 2, 3)), rtol=1e-6, atol=0)
        plain = nn.BatchNorm2d(3).double()(rounded)[:12]
        torch.testing.assert_close(y[:, :3].double(), plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        assert dx.isfinite().all()


def run_traced() -> tuple[list[tuple[str, tuple[int, ...], str]], str, dict[str, Tensor], dict[str, Tensor]]:
    """The collectives of a step, their group, and the step's results without and with torch.compile."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    network = synchronise_bn(make_network(), CPU)
    other = copy.deepcopy(network)
    x = make_images().chunk(world_size)[rank]
    with CollectiveTrace() as trace:
        eager = run_network(network, x, first_row=rank * len(x))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    again = run_network(compiled, x, first_row=rank * len(x))  # type: ignore[arg-type]
    again = {name.replace("_orig_mod.", ""): value for name, value in again.items()}
    calls = [(call.operator, call.shape, call.dtype) for call in trace.collectives]
    return calls, network[0].group, eager, again  # type: ignore[index]


def test_each_direction_is_one_all_reduce_in_a_group_of_its_own_and_one_graph() -> None:
    for calls, group, eager, compiled in run_ranks(2, run_traced):
        assert calls == [("all_reduce", (2, 3), "float64"), ("all_reduce", (2, 3), "float32")]
        assert group != "0"  # the name of the default group
        torch.testing.assert_close(compiled, eager)


@torch.no_grad()
def run_teacher() -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics of a teacher after a batch, the output in evaluation mode, and that of plain BatchNorm."""
    plain = make_network().eval().requires_grad_(False)
    student = synchronise_bn(make_network(), CPU)
    teacher = make_teacher(student)
    teacher(torch.full((2, 3, 6, 6), torch.nan))
    statistics = torch.cat([teacher[0].running_mean, teacher[0].running_var])  # type: ignore[index]
    return statistics, student.eval()(make_images()), plain(make_images())


def test_a_teacher_keeps_its_running_statistics_and_evaluation_uses_them() -> None:
    for statistics, synchronised, plain in run_ranks(2, run_teacher):
        assert statistics.tolist() == [0, 0, 0, 1, 1, 1]
        assert torch.equal(plain, synchronised)


def refuse(norm: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.bn: sync needs {message}"):
        synchronise_bn(nn.Sequential(nn.Sequential(norm)), CPU)
    with pytest.raises(ValueError, match=rf"method\.bn_group: needs {message}"):
        group_bn(nn.Sequential(nn.Sequential(norm)), 2)


def refuse_kinds() -> None:
    refuse(nn.BatchNorm3d(4), r"nn\.BatchNorm1d, nn\.BatchNorm2d or timm's BatchNormAct2d, got BatchNorm3d")
    refuse(nn.SyncBatchNorm(4), r"nn\.BatchNorm1d, nn\.BatchNorm2d or timm's BatchNormAct2d, got SyncBatchNorm")
    refuse(nn.BatchNorm2d(4, momentum=None), "BatchNorm with running statistics and a momentum, got BatchNorm2d")
    refuse(nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm with running statistics")


def test_other_batchnorms_are_refused() -> None:
    run_ranks(1, refuse_kinds)


# Groups


def test_groups_of_a_batchnorm_with_activation() -> None:
    images = make_images()
    network = group_bn(nn.Sequential(BatchNormAct2d(3)), 4)
    expected = torch.cat([nn.BatchNorm2d(3)(half).relu() for half in images.chunk(2)])
    torch.testing.assert_close(network(images), expected)
    assert list(network.state_dict()) == list(nn.Sequential(BatchNormAct2d(3)).state_dict())


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


def float64_reference(x: Tensor, sizes: list[int], network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The output of plain BatchNorm of each group, and the mean of their running statistics."""
    copies = [copy.deepcopy(network).requires_grad_(False) for _ in sizes]
    y = torch.cat([one(part) for one, part in zip(copies, x.split(sizes), strict=True)])
    statistics = [(one[0].running_mean, one[0].running_var) for one in copies]  # type: ignore[index]
    mean, variance = (torch.stack(values).mean(0) for values in zip(*statistics, strict=True))
    return y, mean, variance


@pytest.mark.parametrize("momentum", [0.3, 1.0])
@pytest.mark.parametrize("rows", [False, True])
def test_groups_of_different_sizes_have_equal_weight_in_running_statistics(rows: bool, momentum: float) -> None:
    network = make_network(momentum, rows).double()
    x = torch.arange(8.0).view(8, *[1] * (1 if rows else 3)) * make_images(rows).double()
    y, mean, variance = float64_reference(x, [3, 3, 2], network)
    grouped = group_bn(copy.deepcopy(network), 3)
    torch.testing.assert_close(grouped(x), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grouped[0].running_mean, mean, rtol=1e-13, atol=0)  # type: ignore[index]
    torch.testing.assert_close(grouped[0].running_var, variance, rtol=1e-13, atol=0)  # type: ignore[index]


def test_groups_copy_no_activations_but_the_gradient_and_compile() -> None:
    """Each direction is one kernel of BatchNorm for each group; the gradient's groups are joined by one copy."""
    network = group_bn(nn.Sequential(nn.BatchNorm2d(3)), 2)
    stop_counting(network)
    x, dy = make_images().requires_grad_(), torch.ones(8, 3, 6, 6)
    with StepTrace(ranks_per_node=1) as trace:
        network(x).backward(dy)
    events = [event for event in trace.events if isinstance(event, OperatorEvent)]
    expected = {"native_batch_norm": 4, "native_batch_norm_backward": 4, "cat": 1, "stack": 1, "sum": 1}
    assert Counter(event.name for event in events) == expected
    image_bytes, channel_bytes = x[0].numel() * 4, 3 * 4
    # Reads two images twice, and weight, bias and running statistics; writes two images, their mean and their scale.
    assert events[0].bytes == 3 * 2 * image_bytes + (4 + 2) * channel_bytes
    eager = run_network(group_bn(make_network(), 3), x.detach(), first_row=0)
    compiled = torch.compile(group_bn(make_network(), 3), backend="aot_eager", fullgraph=True)
    again = run_network(compiled, x.detach(), first_row=0)  # type: ignore[arg-type]
    torch.testing.assert_close({name.replace("_orig_mod.", ""): value for name, value in again.items()}, eager)


def test_grouped_batchnorm_keeps_the_memory_format_and_refuses_other_kinds() -> None:
    network = group_bn(make_network(), 4)
    images = make_images().contiguous(memory_format=torch.channels_last)
    whole = network(images)
    thirds = group_bn(make_network(), 3)(images)  # groups of 3, 3 and 2 of 8 images
    torch.testing.assert_close(thirds[6:], make_network()(images[6:]))
    assert whole.shape == thirds.shape
    assert network(images).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"bn_group: needs nn\.BatchNorm1d, .* BatchNormAct2d, got BatchNorm3d"):
        group_bn(nn.Sequential(nn.BatchNorm3d(4)), 2)
