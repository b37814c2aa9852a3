"""Schedules at points with known values, parameter groups with weight decay, and the optimizers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.encoder import Encoder
from trainer.engines.base import update
from trainer.engines.finite import LossScale
from trainer.engines.optim import Lars, Optim, Sgd, cosine, make_optimizer, scaled_lr


def test_cosine_from_start_to_final() -> None:
    assert cosine(0, 100, 0.6, 0.2) == 0.6
    assert cosine(25, 100, 0.6, 0.2) == pytest.approx(0.4 + 0.2 * 0.5**0.5)
    assert cosine(50, 100, 0.6, 0.2) == pytest.approx(0.4)
    assert cosine(100, 100, 0.6, 0.2) == pytest.approx(0.2)
    values = [cosine(step, 100, 0.6, 0.2) for step in range(101)]
    assert values == sorted(values, reverse=True)


def test_cosine_may_rise() -> None:
    values = [cosine(step, 10, 0.9, 1.0) for step in range(11)]
    assert values == sorted(values)
    assert values[-1] == 1.0


def test_warm_up_is_linear_and_never_zero() -> None:
    values = [cosine(step, 100, 1.0, 0.0, warmup_steps=4) for step in range(101)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[52] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0)


def test_warm_up_over_part_of_a_step_or_all_of_them() -> None:
    assert 0 < cosine(2, 10, 1.0, 0.0, warmup_steps=2.5) <= 1
    values = [cosine(step, 10, 1.0, 0.0, warmup_steps=10) for step in range(11)]
    assert values == sorted(values)
    assert values[10] == 1.0


def test_learning_rate_follows_the_batch() -> None:
    assert scaled_lr(0.03, 256) == pytest.approx(0.03)
    assert scaled_lr(0.03, 4096) == pytest.approx(0.48)
    assert scaled_lr(0.03, 64) == pytest.approx(0.0075)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def decays(network: nn.Module, settings: Optim) -> dict[str, float]:
    """Return the weight decay by parameter name."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = make_optimizer(network, settings).param_groups
    return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_weight_decay_of_each_parameter(name: str) -> None:
    network = make_network()
    every = {parameter for parameter, _ in network.named_parameters()}
    settings = {"name": name, "weight_decay": 0.5}
    assert decays(network, Optim.model_validate(settings)) == dict.fromkeys(every, 0.5)
    weights_only = decays(network, Optim.model_validate(settings | {"decay_norm_and_bias": False}))
    assert weights_only == {name: 0.5 if name in ("0.weight", "4.weight") else 0.0 for name in every}


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_norms_and_biases_of_real_networks_do_not_decay(backbone: str) -> None:
    network = Encoder(backbone)
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    exempt = {
        f"{name}.{key}" if name else key
        for name, module in network.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if isinstance(module, norms) or key == "bias"
    }
    found = decays(network, Optim(weight_decay=0.5, decay_norm_and_bias=False))
    assert exempt <= {name for name, decay in found.items() if decay == 0}
    matrices = {name for name, p in network.named_parameters() if p.dim() > 1}
    assert {name for name, decay in found.items() if decay == 0.5} == matrices


class PlainLars:
    """The LARS of MoCo v3's code (moco/optimizer.py), which SimCLR's and BYOL's equal; for one process."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        self.groups, self.lr, self.momentum = groups, lr, momentum
        self.mu = {p: torch.zeros_like(p) for group in groups for p in group["params"]}

    def zero_grad(self) -> None:
        for p in self.mu:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for p in group["params"]:
                assert p.grad is not None
                dp = p.grad + group["weight_decay"] * p
                if group["weight_decay"]:
                    dp = dp * (1e-3 * p.norm() / dp.norm())
                self.mu[p].mul_(self.momentum).add_(dp)
                p.sub_(self.lr * self.mu[p])


@pytest.mark.parametrize("decay", [0.1, 3.0])
def test_lars_agrees_with_its_formula(decay: float) -> None:
    networks = [make_network(), make_network()]
    settings = {"lr": 0.3, "momentum": 0.9}
    groups = [
        [
            {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        for network in networks
    ]
    optimizers: list[Lars | PlainLars] = [Lars(groups[0], **settings), PlainLars(groups[1], **settings)]
    images, labels = torch.randn(32, 3, 4, 4), torch.arange(32) % 2
    for _ in range(5):
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.05), ("lars", 1.0), ("adamw", 0.01)])
def test_each_learns(name: str, lr: float, decay_norm_and_bias: bool) -> None:
    network = make_network()
    settings = Optim.model_validate({"name": name, "lr": lr, "decay_norm_and_bias": decay_norm_and_bias})
    optimizer = make_optimizer(network, settings)
    images, labels = torch.randn(32, 3, 4, 4), torch.arange(32) % 2
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def gradients(network: nn.Module, seed: int, factor: float = 1.0) -> list[Tensor]:
    """Give a network random gradients and return them."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = factor * torch.randn(p.shape, generator=generator)
    return [p.grad for p in network.parameters() if p.grad is not None]


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the parameters and of the optimizer's state."""
    found = {name: p.detach().clone() for name, p in network.named_parameters()}
    for name, p in network.named_parameters():
        found |= {f"{name}.{key}": x.clone() for key, x in optimizer.state[p].items()}
    return found


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_skipped_step_changes_no_bit(name: str, bad: float, decay_norm_and_bias: bool) -> None:
    """Even the first step may be skipped; later ones then do what they do without it."""
    settings = Optim.model_validate({"name": name, "decay_norm_and_bias": decay_norm_and_bias})
    network, other = make_network(), make_network()
    optimizer, reference = make_optimizer(network, settings), make_optimizer(other, settings)
    for step in range(4):
        gradients(network, step)
        if step in (0, 2):
            before = everything(network, optimizer)
            next(network.parameters()).grad[0] = bad  # type: ignore[index]
            update(optimizer, torch.tensor(bad), 1.0, None, 0.1)
            after = everything(network, optimizer)
            assert all(torch.equal(after[key], x) for key, x in before.items())
            assert not any(x.any() for key, x in after.items() if key not in before), "the state starts at zero"
        else:
            gradients(other, step)
            for taken, owner in ((optimizer, network), (reference, other)):
                update(taken, torch.tensor(2.0), 1.0, None, 0.1)
                assert all(p.grad is None for p in owner.parameters())
    expected = everything(other, reference)
    assert all(torch.equal(x, expected[key]) for key, x in everything(network, optimizer).items())
    assert not torch.equal(next(network.parameters()), next(make_network().parameters()))


@pytest.mark.parametrize("clip", [None, 1.0, 100.0])
@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_clipping_and_the_loss_scale(name: str, scale: float | None, clip: float | None) -> None:
    """The optimizer divides the gradients; the same as dividing them before."""
    settings = Optim.model_validate({"name": name, "weight_decay": 0.1})
    network, other = make_network(), make_network()
    optimizer, reference = make_optimizer(network, settings), make_optimizer(other, settings)
    for step in range(3):
        norm = torch.stack(torch._foreach_norm(gradients(network, step, scale or 1.0))).norm() / (scale or 1.0)
        update(optimizer, norm, clip, LossScale(torch.device("cpu"), scale) if scale else None, 0.1)
        gradients(other, step)
        if clip is not None:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        update(reference, norm, None, None, 0.1)
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    networks = [make_network(), make_network()]
    options: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1}
    options["nesterov"] = nesterov and momentum > 0
    optimizers = [
        Sgd(networks[0].parameters(), **options),
        torch.optim.SGD(networks[1].parameters(), **options),
    ]
    for step in range(4):
        for network, optimizer in zip(networks, optimizers, strict=True):
            gradients(network, step)
            optimizer.step()
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
