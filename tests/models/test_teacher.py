"""The teacher: what of the student it averages, what it copies, and that it does not learn by itself."""

import torch
from torch import nn

from models.encoder import Encoder
from models.teacher import ema_update, make_teacher


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
    ema_update(teacher, student, 0.75)
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
    ema_update(teacher, student, 1.0)
    assert all(torch.equal(p, old) for p, old in zip(teacher.parameters(), before, strict=True))
    ema_update(teacher, student, 0.0)
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
    ema_update(teacher, student, 0.0)
    expected = student.state_dict()
    assert {name for name in expected if name.startswith("predictor")} == expected.keys() - teacher.state_dict().keys()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    images = [torch.rand(4, 3, 32, 32)]
    student.predictor = None
    torch.testing.assert_close(teacher.eval()(images), student.eval()(images))
