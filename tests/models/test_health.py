"""The signs that a run does not learn: what is measured, on one rank and several, and when a sign is named."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models import adco
from models.health import HealthCheck, describe_collapse, embedding_spread
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
from tests.ranks import run_ranks

N, D = 600, 16


def measure() -> list[dict[str, float]]:
    """Of embeddings all over the sphere; in four directions; on a line; nearly at a point; at a point."""
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    flat_ND = x_ND * (torch.arange(D) < 4)
    line_ND = x_ND[:, :1].sign() * torch.ones(D)
    near_ND = 1 + 0.01 * x_ND
    world_size, rank = dist.get_world_size(), dist.get_rank()
    return [
        embedding_spread(nn.functional.normalize(z_ND, dim=1).chunk(world_size)[rank])
        for z_ND in (x_ND, flat_ND, line_ND, near_ND, torch.ones(N, D))
    ]


def test_spread() -> None:
    everywhere, flat, line, near, point = run_ranks(1, measure)[0]
    assert everywhere["feature_std"] == pytest.approx(1, abs=0.02)
    assert D - 0.1 < everywhere["effective_rank"] <= D
    assert flat["effective_rank"] == pytest.approx(4, abs=0.05)
    assert flat["feature_std"] == pytest.approx((4 / D) ** 0.5, abs=0.02)  # 4 of D elements, 1/2 each, times sqrt(D)
    assert (line["effective_rank"], line["feature_std"]) == pytest.approx((1, 1), abs=0.01)
    assert (point["effective_rank"], point["feature_std"]) == pytest.approx((1, 0), abs=1e-3)
    assert [describe_collapse(x) is None for x in (everywhere, flat)] == [True, True]
    assert "vary in one direction only" in str(describe_collapse(line))
    assert all("nearly the same embedding" in str(describe_collapse(x)) for x in (near, point))


def test_spread_is_that_of_all_ranks() -> None:
    (alone,) = run_ranks(1, measure)
    for several in run_ranks(3, measure):
        for found, expected in zip(several, alone, strict=True):
            assert found == pytest.approx(expected, abs=1e-6)


HEALTHY = {
    "feature_std": 0.8, "effective_rank": 20.0, "adversary_grad_norm": 4e-5, "bank_share": 0.65, "bank_norm": 0.9,
    "pretext_top1": 0.85,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adversary_grad_norm": 2e-14}, ["no weight", "2e-14", "bank.init=keys", "bank.temperature"]),
        ({"bank_share": 0.99}, ["same weight", "bank.lr"]),
        ({"bank_norm": 0.002}, ["drifted", "0.002", "bank.weight_decay"]),
        ({"bank_norm": 3e4}, ["drifted", "3e+04", "bank.lr"]),
        ({"pretext_top1": 0.99}, ["too easy", "99.0%", "bank.temperature"]),
    ],
)
def test_a_sign_is_named_once_after_it_lasted(changes: dict[str, float], words: list[str]) -> None:
    check, bad = HealthCheck(), HEALTHY | changes
    said = [check.new_signs(row) for row in (HEALTHY, bad, bad, HEALTHY, bad, bad, bad, bad, HEALTHY, bad, bad, bad)]
    assert [len(signs) for signs in said] == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert all(word in said[6][0] for word in words)


def test_a_collapse_is_named_at_once_and_methods_without_negatives_have_no_other_sign() -> None:
    check = HealthCheck()
    assert check.new_signs({"feature_std": 0.9, "effective_rank": 9.0}) == []
    (sign,) = check.new_signs({"feature_std": 0.01, "effective_rank": 9.0})
    assert "collapsed" in sign
    assert "model.predictor" in sign
    assert check.new_signs({"feature_std": 0.01, "effective_rank": 9.0}) == []


def provoke(kind: str) -> list[str]:
    """Return the signs after four steps of AdCo whose bank is made to fail, or "fine"."""
    generator = torch.Generator().manual_seed(0)
    q_BD = nn.functional.normalize(torch.randn(8, D, generator=generator), dim=1)
    k_BD = nn.functional.normalize(q_BD + 0.5 * torch.randn(8, D, generator=generator), dim=1)
    rows = {
        "fine": q_BD.repeat(3, 1) + 0.4 * torch.randn(24, D, generator=generator),
        "no weight": -q_BD.mean(0).repeat(24, 1),
        "equal weight": q_BD.mean(0).repeat(24, 1),
        "norm": -q_BD.mean(0).repeat(24, 1),
        "too easy": torch.randn(24, D, generator=generator),
    }[kind]
    positive = q_BD if kind in ("no weight", "norm", "too easy") else k_BD
    settings = BankSettings(
        size=24, temperature=0.02 if kind in ("no weight", "norm") else 0.1, weight_decay=30.0, momentum=0
    )
    bank = Bank(settings, D, make_mesh("sharded", torch.device("cpu"), 1))
    bank.fill(nn.functional.normalize(rows, dim=1))
    method = adco.AdCo(nn.Identity(), adco.Settings(batch_keys=kind == "no weight"), bank)  # type: ignore[arg-type]
    check, signs = HealthCheck(), []
    for _ in range(5):
        output = method.loss({1: q_BD.clone().requires_grad_()}, {0: positive})
        method.update_negatives([output.negatives_update], 0.0333 if kind == "norm" else 0.0, seed=0)
        averages = {name: float(value) for name, value in output.metrics.items()}
        signs += check.new_signs(averages | bank.metrics())
    return signs


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fine", []),
        ("no weight", ["no weight"]),
        ("equal weight", ["same weight"]),
        ("norm", ["drifted"]),
        ("too easy", ["too easy"]),
    ],
)
def test_a_bank_that_fails_is_named(kind: str, words: list[str]) -> None:
    (signs,) = run_ranks(1, provoke, kind)
    for word in words:
        assert sum(word in sign for sign in signs) == 1, signs
    if not words:
        assert signs == []
