"""The teacher: what of the student it averages, what it copies, and that it does not learn by itself."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models.encoder import Encoder
from models.teacher import MovingAverage, make_teacher


def make_student() -> nn.Module:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    student(torch.rand(2, 3, 8, 8))  # so that the running statistics are not those of the start
    return student


def test_starts_equal_and_apart() -> None:
    student = make_student()
    teacher = make_teacher(student)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])
        assert value.data_ptr() != student.state_dict()[name].data_ptr()
    assert all(p.requires_grad for p in student.parameters())


def test_takes_no_gradient() -> None:
    teacher = make_teacher(make_student())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.rand(2, 3, 8, 8)).requires_grad


def test_own_batches_leave_its_running_statistics_alone() -> None:
    teacher = make_teacher(make_student())
    before = {name: value.clone() for name, value in teacher.state_dict().items() if "running" in name}
    teacher.train()(torch.rand(2, 3, 8, 8))
    for name, value in before.items():
        assert torch.equal(teacher.state_dict()[name], value), name


def test_moving_average() -> None:
    student = make_student()
    teacher = make_teacher(student)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.add_(1 + torch.rand(tensor.shape).to(tensor.dtype))
    now = {name: value.clone() for name, value in student.state_dict().items()}
    MovingAverage(teacher, student).update(0.75)
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * now[name])
        else:
            assert torch.equal(value, now[name])
        assert torch.equal(student.state_dict()[name], now[name])
    assert "1.num_batches_tracked" in now
    assert all(p.grad_fn is None and not p.requires_grad for p in teacher.parameters())


def test_momentum_of_one_changes_nothing_and_of_zero_copies() -> None:
    student = make_student()
    teacher = make_teacher(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = [p.clone() for p in teacher.parameters()]
    MovingAverage(teacher, student).update(1.0)
    assert all(torch.equal(p, old) for p, old in zip(teacher.parameters(), before, strict=True))
    MovingAverage(teacher, student).update(0.0)
    for p, source in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, source.detach())


def test_a_predictor_is_the_students_alone() -> None:
    """The average goes by name, so what only the student has shifts nothing."""
    torch.manual_seed(0)
    student = Encoder("resnet18", dim=8, head_norm=True, predictor=12, backbone_args={"channels": (8, 8, 8, 16)})
    teacher = make_teacher(student)
    assert student.predictor is not None
    assert teacher.predictor is None
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.rand(p.shape))
    student([torch.rand(4, 3, 32, 32)])
    MovingAverage(teacher, student).update(0.0)
    expected = student.state_dict()
    assert {name for name in expected if name.startswith("predictor")} == expected.keys() - teacher.state_dict().keys()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    images = [torch.rand(4, 3, 32, 32)]
    student.predictor = None
    torch.testing.assert_close(teacher.eval()(images), student.eval()(images))


def randomise(network: nn.Module) -> None:
    with torch.no_grad():
        for x in (*network.parameters(), *network.buffers()):
            x.add_(torch.rand(x.shape).to(x.dtype))


@pytest.mark.parametrize("momentum", [0.999, 0.75, 0.0])
def test_a_momentum_on_the_device_averages_as_a_number_does(momentum: float) -> None:
    torch.manual_seed(0)
    student = Encoder("resnet18", dim=8, head_norm=True, backbone_args={"channels": (8, 8, 8, 16)})
    student.to(memory_format=torch.channels_last)
    teachers = [make_teacher(student) for _ in range(2)]
    randomise(student)
    MovingAverage(teachers[0], student).update(momentum)
    MovingAverage(teachers[1], student).update(torch.tensor(momentum))
    for x, y in zip(*(teacher.state_dict().values() for teacher in teachers), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("momentum", [1.0, torch.tensor(1.0)])
def test_a_momentum_of_one_keeps_every_bit_whatever_the_student_is(momentum: float | Tensor) -> None:
    student = make_student()
    teacher = make_teacher(student)
    with torch.no_grad():
        teacher.get_parameter("0.bias").fill_(-0.0)
        for x in (*student.parameters(), *student.buffers()):
            x.fill_(torch.nan if x.is_floating_point() else 0)
    floating = [x for x in teacher.state_dict().values() if x.is_floating_point()]
    before = [x.clone() for x in floating]
    MovingAverage(teacher, student).update(momentum)
    for x, old in zip(floating, before, strict=True):
        assert torch.equal(x.view(torch.int32), old.view(torch.int32))


def test_tensors_that_are_not_dense_are_averaged_too() -> None:
    student, teacher = nn.Module(), nn.Module()
    student.register_buffer("x", torch.rand(4, 6)[:, ::2])
    teacher.register_buffer("x", torch.rand(4, 6)[:, ::2])
    student.register_buffer("y", torch.rand(4, 6).T)
    teacher.register_buffer("y", torch.rand(6, 4))
    expected = {name: teacher.state_dict()[name] * 0.75 + x * 0.25 for name, x in student.state_dict().items()}
    MovingAverage(teacher, student).update(torch.tensor(0.75))
    torch.testing.assert_close(dict(teacher.state_dict()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "resnetv2_50"])
def test_kept_casts_give_the_same_bits_as_autocast(name: str, dtype: torch.dtype) -> None:
    """resnetv2_50 computes its filters from the stored ones, so they must stay as they are."""
    small: dict[str, dict[str, Any]] = {
        "resnet18": {"channels": (8, 8, 8, 16)},
        "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 16},
        "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32), "conv_layer": timm.layers.StdConv2d},
    }
    torch.manual_seed(0)
    student = Encoder(name, dim=8, head_norm=True, backbone_args=small[name])
    casting, keeping = make_teacher(student), make_teacher(student)
    averages = [MovingAverage(casting, student), MovingAverage(keeping, student, precision=dtype)]
    images = [torch.rand(4, 3, 16, 16)]
    for step in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            assert torch.equal(casting(images), keeping(images)), step
        randomise(student)
        for average in averages:
            average.update(0.5)
    assert all(x.dtype == torch.float32 for x in keeping.state_dict().values() if x.is_floating_point())
    for x, y in zip(casting.state_dict().values(), keeping.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():  # without autocast, and after weights were loaded
        assert torch.equal(casting(images), keeping(images))
        keeping.load_state_dict(student.state_dict())
        casting.load_state_dict(student.state_dict())
        averages[1].loaded()
        with torch.autocast("cpu", dtype):
            assert torch.equal(casting(images), keeping(images))


def test_kept_casts_spare_the_cast_of_every_weight() -> None:
    student = Encoder("resnet18", dim=8, backbone_args={"channels": (8, 8, 8, 16)})
    casts = []
    for precision in (torch.float32, torch.bfloat16):
        teacher = make_teacher(student)
        MovingAverage(teacher, student, precision=precision)
        with torch.profiler.profile() as profile, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            teacher([torch.rand(4, 3, 16, 16)])
        casts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy"))
    weights = sum(p.dim() > 1 for p in student.parameters()) + sum(isinstance(m, nn.Linear) for m in student.modules())
    assert casts[0] - casts[1] == weights, "each filter and matrix, and the biases of the head"


def test_layers_that_compute_their_weight_keep_casting() -> None:
    student = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    MovingAverage(teacher, student, precision=torch.bfloat16)
    assert ["forward" in m.__dict__ for m in teacher] == [False, True]
