"""CaCo's bank against a plain fp64 formula, on one rank and several, in every placement.

B images over all ranks, V views, D dimensions, K rows.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import caco
from models.encoder import Encoder
from models.negatives.base import BankSettings, Placement, make_mesh
from tests.models.test_methods import unit
from tests.ranks import run_ranks
from trainer.plan.collectives import CollectiveTrace

B, D, K, V, STEPS = 12, 16, 20, 3, 3
T, T_BANK, LR, MOMENTUM, DECAY = 0.3, 0.2, 0.5, 0.9, 0.01
BANK = BankSettings(size=K, temperature=T_BANK, momentum=MOMENTUM, weight_decay=DECAY)


def embeddings(step: int) -> tuple[Tensor, Tensor]:
    """Return queries and keys of all images [V, B, D]. Few rows are near, so that several queries share a positive."""
    centre = unit(1, D, seed=7) + 0.5 * unit(B, D, seed=step)
    q, k = (nn.functional.normalize(centre + 0.5 * unit(V, B, D, seed=100 * s + step), dim=-1) for s in (1, 2))
    return q, k


def steps(
    placement: Placement,
    ranks_per_node: int,
    micro_batches: int,
    precision: torch.dtype = torch.float64,
    stored: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[Tensor], int, list[int]]:
    """Return w, v and n of this shard after some steps, its first row, and how many queries share a positive."""
    mesh = make_mesh(placement, torch.device("cpu"), ranks_per_node)
    bank = caco.CooperativeBank(BANK.model_copy(update=stored), D, mesh, precision)
    bank.fill(2 * unit(K, D, seed=3)[bank.first : bank.first + len(bank.w_KD)])
    method = caco.CaCo(cast(Encoder, nn.Identity()), caco.Settings(temperature=T), bank)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = []
    for step in range(STEPS):
        q, k = (x.to(precision) for x in embeddings(step))
        mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
        updates = []
        for q_part, k_part in zip(q[:, mine].chunk(micro_batches, 1), k[:, mine].chunk(micro_batches, 1), strict=True):
            output = method.loss(dict(enumerate(q_part)), {j: k_part[j] for j in (0, 1)})
            updates.append(output.negatives_update)
            assert 0 < output.metrics["distinct_positives"] <= 1
        shared.append(len(updates[0][0].row_A) - len(updates[0][0].row_A.unique()))
        method.update_negatives(updates, LR, seed=step)
    assert bank.v_KD is not None
    return [bank.w_KD, bank.v_KD, bank.n_KD], bank.first, shared


def formula() -> tuple[Tensor, Tensor]:
    """Return w and v after the same steps: the published update, row by row, from all similarities."""
    w, v = 2 * unit(K, D, seed=3), torch.zeros(K, D, dtype=torch.float64)
    for step in range(STEPS):
        q, k = embeddings(step)
        n = nn.functional.normalize(w, dim=1)
        gradient = torch.zeros_like(w)
        for j in (0, 1):
            positive = (k[j] @ n.T).argmax(1)
            for i in [i for i in range(V) if i != j]:
                s = q[i] @ n.T
                p = torch.softmax(s / T_BANK, 1)
                chosen = torch.zeros_like(p).scatter(1, positive[:, None], 1).bool()
                c = torch.where(chosen, 1 - p, p) * (1.0 if i < 2 else 0.5) / B
                gradient += (c.T @ q[i] - (c * s).sum(0)[:, None] * n) / w.norm(dim=1, keepdim=True) / T_BANK
        v = MOMENTUM * v + DECAY * w - gradient
        w = w - LR * v
    return w, v


@pytest.mark.parametrize(
    ("world_size", "placement", "ranks_per_node", "micro_batches"),
    [
        (1, "sharded", 1, 1),
        (1, "sharded", 1, 3),
        (2, "sharded", 2, 1),
        (3, "sharded", 3, 1),
        (2, "replicated", 2, 1),
        (4, "node", 2, 1),
    ],
)
def test_the_bank_agrees_with_the_formula(
    world_size: int, placement: Placement, ranks_per_node: int, micro_batches: int
) -> None:
    w, v = formula()
    for (found_w, found_v, found_n), first, shared in run_ranks(
        world_size, steps, placement, ranks_per_node, micro_batches
    ):
        mine = slice(first, first + len(found_w))
        torch.testing.assert_close(found_w, w[mine], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found_v, v[mine], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found_n, nn.functional.normalize(w[mine], dim=1), rtol=1e-9, atol=1e-11)
        assert min(shared) > 0, "several queries share a positive, whose gradients are summed"


def test_positives_approach_their_queries_and_adco_s_negatives_do_not() -> None:
    """One row is the positive of all queries, so the bank's step moves it towards them."""
    ((before, after),) = run_ranks(1, one_row)
    assert after > before + 0.01


def one_row() -> tuple[float, float]:
    bank = caco.CooperativeBank(BANK.model_copy(update={"size": 2}), D, make_mesh("sharded", torch.device("cpu"), 1))
    bank.fill(torch.eye(2, D))
    method = caco.CaCo(cast(Encoder, nn.Identity()), caco.Settings(temperature=T), bank)
    q_BD = nn.functional.normalize(torch.eye(2, D)[:1] + 0.5 * torch.ones(B, D) / D**0.5, dim=1)
    similarities = []
    for step in range(2):
        output = method.loss({0: q_BD, 1: q_BD}, {0: q_BD, 1: q_BD})
        similarities.append(float(output.metrics["positive_similarity"]))
        method.update_negatives([output.negatives_update], LR, seed=step)
    return similarities[0], similarities[1]


STORED: list[dict[str, Any]] = [
    {"weights": "bf16", "velocity": "bf16"},
    {"weights": "bf16"},
    {"weights": "bf16", "velocity": "none", "momentum": 0.0},
]


def one_step(stored: dict[str, Any], seeds: int) -> list[Tensor]:
    """Return weights and velocity after a step, averaged over the seeds of the rounding, and the largest deviations."""
    settings = BANK.model_copy(update=stored)
    bank = caco.CooperativeBank(settings, D, make_mesh("sharded", torch.device("cpu"), 1))
    method = caco.CaCo(cast(Encoder, nn.Identity()), caco.Settings(temperature=T), bank)
    q, k = (x.float() for x in embeddings(0))
    results = []
    for seed in range(seeds):
        bank.fill(2 * unit(K, D, seed=3).bfloat16().float())
        output = method.loss(dict(enumerate(q)), {j: k[j] for j in (0, 1)})
        method.update_negatives([output.negatives_update], LR, seed)
        results.append([x.float().clone() for x in (bank.w_KD, bank.v_KD) if x is not None])
    return [torch.stack(x) for x in zip(*results, strict=True)]


@pytest.mark.parametrize("stored", [STORED[0], *(pytest.param(x, marks=pytest.mark.slow) for x in STORED[1:])], ids=str)
def test_a_bank_in_bf16_takes_the_same_step_on_average(stored: dict[str, Any]) -> None:
    """The positives are rounded twice, each time to one of the two neighbours."""
    count = 400
    (rounded,) = run_ranks(1, one_step, stored, count)
    exact_settings = {**stored, "weights": "fp32"} | ({"velocity": "fp32"} if "momentum" not in stored else {})
    (exact,) = run_ranks(1, one_step, exact_settings, 1)
    start = 2 * unit(K, D, seed=3).bfloat16().float()
    for x_SKD, expected_1KD in zip(rounded, exact, strict=True):
        largest_KD = torch.maximum(x_SKD.abs().amax(0), start.abs())
        gap_KD = 2.0 ** (torch.frexp(largest_KD).exponent - 7)  # between AdCo's step and CaCo's a number may be larger
        assert ((x_SKD - expected_1KD).abs() <= 2 * gap_KD).all()
        assert ((x_SKD.mean(0) - expected_1KD[0]).abs() < 3 * gap_KD / count**0.5).all()
    assert (exact[0] - start).abs().max() > 0.05


@pytest.mark.parametrize(("world_size", "placement"), [(2, "sharded"), (3, "sharded"), (4, "node")])
def test_a_bank_in_bf16_is_rounded_alike_in_every_placement(world_size: int, placement: Placement) -> None:
    (whole,) = run_ranks(1, bf16_steps, "sharded", 1)
    ranks = run_ranks(world_size, bf16_steps, placement, 2 if placement == "node" else world_size)
    w_KD = torch.cat(ranks[:2] if placement == "node" else ranks)
    assert w_KD.dtype == torch.bfloat16
    assert (w_KD != whole).float().mean() < 0.02, "but for sums in another order that meet a random threshold"
    torch.testing.assert_close(w_KD, whole, rtol=0.02, atol=0.02)
    if placement == "node":
        assert torch.equal(torch.cat(ranks[2:]), w_KD), "replicas must not differ by a bit"


def bf16_steps(placement: Placement, ranks_per_node: int) -> Tensor:
    (w_KD, _, _), _, _ = steps(placement, ranks_per_node, 1, torch.float32, STORED[0])
    return w_KD


def sent(rows: int) -> int:
    """Return the bytes that rank 0 of 16 sends in one step of a bank of so many rows."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    try:
        mesh = make_mesh("sharded", torch.device("cpu"), 16)
        with FakeTensorMode():
            bank = caco.CooperativeBank(BANK.model_copy(update={"size": rows}), D, mesh)
            method = caco.CaCo(cast(Encoder, nn.Identity()), caco.Settings(temperature=T), bank)
            views = [torch.empty(B, D, requires_grad=True) for _ in range(2)]
            with CollectiveTrace() as trace:
                output = method.loss(dict(enumerate(views)), {j: views[j].detach() for j in (0, 1)})
                output.loss.backward()
                method.update_negatives([output.negatives_update], LR, seed=0)
    finally:
        dist.destroy_process_group()
    return sum(collective.sent for collective in trace.collectives)


def test_traffic_does_not_depend_on_the_number_of_rows() -> None:
    assert sent(4096) == sent(2**20) > 0
