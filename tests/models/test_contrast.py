"""Contrastive loss and bank on several ranks against a plain fp64 formula on one, for every placement.

With TRITON_INTERPRET=1 in the environment (see `test_triton.py`) the Triton kernels are tested, otherwise the others.
"""

import os
from typing import Literal, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.adco import AdCo, Settings
from models.encoder import Encoder
from models.negatives.bank import Bank, BankUpdate
from models.negatives.base import BankSettings, Placement, make_mesh
from models.negatives.contrast import contrast
from tests.kernels.cases import use_kernels
from tests.ranks import run_ranks

B, D, K = 12, 32, 37  # images over all ranks; K is divisible by no number of ranks
T, TA, LR, MOMENTUM, DECAY = 0.12, 0.05, 0.5, 0.9, 1e-2
STEPS = 10
TRITON = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = ["triton"] if TRITON else ["reference", "chunked"]
CPU = torch.device("cpu")
# Number of ranks, placement and ranks of a node.
PLACEMENTS = [
    (1, "sharded", 1),
    (2, "sharded", 2),
    (3, "sharded", 3),
    (4, "sharded", 4),
    (2, "replicated", 2),
    (3, "replicated", 3),
    (4, "node", 2),
]
if TRITON:  # a kernel sees a rank's whole bank or its shard, whatever the placement is called
    PLACEMENTS = [(1, "sharded", 1), (3, "sharded", 3), (2, "replicated", 2)]


class Outcome(NamedTuple):
    """One rank after ten steps: losses, gradients of its queries, its shard of the bank, and the first row's index."""

    losses: Tensor
    dq: Tensor
    w: Tensor
    v: Tensor
    first: int


def unit(*shape: int, seed: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(x, dim=-1)


def make_bank(
    placement: Placement,
    ranks_per_node: int,
    dtype: torch.dtype = torch.float32,
    stored: Literal["fp32", "bf16"] = "fp32",
) -> Bank:
    settings = BankSettings(
        size=K, temperature=TA, momentum=MOMENTUM, weight_decay=DECAY, weights=stored, velocity=stored
    )
    bank = Bank(settings, D, make_mesh(placement, CPU, ranks_per_node), dtype)
    w_KD = 1.5 * unit(K, D, seed=1).to(dtype)
    bank.fill(w_KD[bank.first : bank.first + len(bank.w_KD)])
    return bank


def ten_steps(
    kernels: str,
    placement: Placement,
    ranks_per_node: int,
    batch_keys: bool,
    views: int,
    stored: Literal["fp32", "bf16"] = "fp32",
) -> Outcome:
    use_kernels(kernels)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    bank = make_bank(placement, ranks_per_node, stored=stored)
    mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
    losses, gradients = [], []
    for step in range(STEPS):
        k_BD = unit(B, D, seed=10 + step)[mine].float()
        queries = torch.cat([unit(B, D, seed=20 + step + 7 * view)[mine].float() for view in range(views)])
        queries.requires_grad_()
        result = contrast(queries, k_BD, bank, T, batch_keys)
        result.loss_N.sum().backward()
        assert queries.grad is not None
        bank.update([[result.bank_update(1 / B)]], LR, seed=step)
        losses.append(result.loss_N.detach().view(views, -1))
        gradients.append(queries.grad.view(views, -1, D))
    assert bank.v_KD is not None
    return Outcome(torch.stack(losses), torch.stack(gradients), bank.w_KD, bank.v_KD, bank.first)


def expected(batch_keys: bool, views: int) -> Outcome:
    """Compute the same in fp64 with autograd and materialised logits."""
    w = (1.5 * unit(K, D, seed=1)).float().double()
    v = torch.zeros_like(w)
    losses, gradients = [], []
    for step in range(STEPS):
        k_BD = unit(B, D, seed=10 + step)
        q = torch.cat([unit(B, D, seed=20 + step + 7 * view) for view in range(views)]).requires_grad_()
        weights = w.clone().requires_grad_()
        n = weights / weights.norm(dim=1, keepdim=True)
        own = k_BD.repeat(views, 1)
        positive = (q * own).sum(1, keepdim=True)
        rivals = q @ k_BD.T if batch_keys else positive
        similarity = torch.cat([rivals, q @ n.T], dim=1)
        loss = torch.logsumexp(similarity / T, 1) - positive[:, 0] / T
        (dq,) = torch.autograd.grad(loss.sum(), q, retain_graph=True)
        adversarial = (torch.logsumexp(similarity / TA, 1) - positive[:, 0] / TA).sum() / B
        (gradient,) = torch.autograd.grad(adversarial, weights)
        v = MOMENTUM * v - gradient + DECAY * w
        w = w - LR * v
        losses.append(loss.detach().view(views, B))
        gradients.append(dq.view(views, B, D))
    return Outcome(torch.stack(losses), torch.stack(gradients), w, v, 0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("batch_keys", [True] if TRITON else [True, False])  # False does not concern the kernels
@pytest.mark.parametrize(("world_size", "placement", "ranks_per_node"), PLACEMENTS)
def test_every_placement_agrees_with_the_formula(
    world_size: int, placement: str, ranks_per_node: int, batch_keys: bool, kernels: str
) -> None:
    views = 2
    truth = expected(batch_keys, views)
    ranks = run_ranks(world_size, ten_steps, kernels, placement, ranks_per_node, batch_keys, views)
    for rank, got in enumerate(ranks):
        mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
        shard = slice(got.first, got.first + len(got.w))
        for name, value, true in (
            ("loss", got.losses, truth.losses[:, :, mine]),
            ("dq", got.dq, truth.dq[:, :, mine]),
            ("w", got.w, truth.w[shard]),
            ("v", got.v, truth.v[shard]),
        ):
            torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-5, msg=name)
    assert sorted({got.first for got in ranks})[0] == 0
    if placement == "replicated":
        assert all(torch.equal(got.w, ranks[0].w) for got in ranks), "replicas must not differ by a bit"
    if placement == "node":
        assert torch.equal(ranks[0].w, ranks[2].w)
        assert torch.equal(ranks[1].w, ranks[3].w)


@pytest.mark.parametrize(
    ("world_size", "placement", "ranks_per_node"), [(2, "sharded", 2), *([] if TRITON else [(4, "node", 2)])]
)
def test_a_bank_in_bf16_is_rounded_alike_in_every_placement(
    world_size: int, placement: str, ranks_per_node: int
) -> None:
    (whole,) = run_ranks(1, ten_steps, KERNELS[-1], "sharded", 1, True, 1, "bf16")
    ranks = run_ranks(world_size, ten_steps, KERNELS[-1], placement, ranks_per_node, True, 1, "bf16")
    w_KD = torch.cat([got.w for got in ranks[:2]])
    assert w_KD.dtype == torch.bfloat16
    assert (w_KD != whole.w).float().mean() < 0.02  # where sums in another order meet a random threshold
    torch.testing.assert_close(w_KD, whole.w, rtol=0.02, atol=0.02)
    if placement == "node":
        assert torch.equal(torch.cat([got.w for got in ranks[2:]]), w_KD), "replicas must not differ by a bit"


def rounded() -> None:
    bank = make_bank("sharded", 1, torch.bfloat16)
    q_BD, k_BD = unit(B, D, seed=3).float().requires_grad_(), unit(B, D, seed=4).float()
    result = contrast(q_BD, k_BD, bank, T, True)
    result.loss_N.sum().backward()
    q, k, n = (x.detach().bfloat16().double() for x in (q_BD, k_BD, bank.n_KD))
    q.requires_grad_()
    logits = q @ torch.cat([k, n]).T / T
    loss_N = torch.logsumexp(logits, 1) - logits[:, :B].diagonal()
    (dq,) = torch.autograd.grad(loss_N.sum(), q)
    torch.testing.assert_close(result.loss_N.double(), loss_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q_BD.grad.double(), dq, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    assert result.queries_ND.dtype == torch.bfloat16
    bank.update([[result.bank_update(1 / B)]], LR, seed=0)
    assert bank.w_KD.dtype == torch.float32
    # Up to one unit of bf16's last place: Triton's interpreter cuts digits off.
    torch.testing.assert_close(bank.n_KD.float(), nn.functional.normalize(bank.w_KD, dim=1), rtol=0, atol=4e-3)


def test_every_similarity_is_of_the_rounded_vectors() -> None:
    run_ranks(1, rounded)


def adco_losses(symmetric: bool, crops: str, views: int) -> tuple[float, Tensor]:
    """Return AdCo's loss on given embeddings and the summed probability of the bank's updates."""
    bank = make_bank("sharded", 1, torch.float64)
    network = cast(Encoder, nn.Identity())
    adco = AdCo(network, Settings.model_validate({"temperature": T, "symmetric": symmetric, "crops": crops}), bank)
    keys = {j: unit(B, D, seed=10 + j) for j in ([0, 1] if symmetric else [0])}
    queries = {i: unit(B, D, seed=20 + i) for i in range(views) if list(keys) != [i]}
    output = adco.loss(queries, keys)
    z = torch.cat([(r.coef_N * torch.exp(r.q_ND @ bank.n_KD.T / TA).sum(1)) for r in output.negatives_update])
    return float(output.loss), z.sum()


def pair_loss(i: int, j: int) -> float:
    """Return the mean loss of view i's queries against view j's keys."""
    bank = make_bank("sharded", 1, torch.float64)
    return float(contrast(unit(B, D, seed=20 + i), unit(B, D, seed=10 + j), bank, T, True).loss_N.mean())


def variants() -> None:
    two, three = 2, 3
    asym = pair_loss(1, 0)
    assert adco_losses(False, "sum", two)[0] == pytest.approx(asym)
    sym = (pair_loss(1, 0) + pair_loss(0, 1)) / 2
    assert adco_losses(True, "sum", two)[0] == pytest.approx(sym)
    assert adco_losses(False, "sum", three)[0] == pytest.approx(pair_loss(1, 0) + pair_loss(2, 0))
    assert adco_losses(False, "mean", three)[0] == pytest.approx((pair_loss(1, 0) + pair_loss(2, 0)) / 2)
    both = pair_loss(1, 0) + pair_loss(2, 0) + pair_loss(0, 1) + pair_loss(2, 1)
    assert adco_losses(True, "sum", three)[0] == pytest.approx(both / 2)
    assert adco_losses(True, "mean", three)[0] == pytest.approx(both / 4)
    # The probabilities of a query over the negatives add up to less than its weight.
    assert 0 < adco_losses(False, "mean", three)[1] < 1
    assert 0.5 * float(adco_losses(False, "sum", three)[1]) == pytest.approx(
        float(adco_losses(False, "mean", three)[1])
    )


def test_every_variant_weighs_its_views() -> None:
    run_ranks(1, variants)


def hardest() -> None:
    bank = make_bank("sharded", 1)
    k_BD = unit(B, D, seed=3).float()
    q_BD = nn.functional.normalize(k_BD + 0.1 * unit(B, D, seed=4).float(), dim=1)
    result = contrast(q_BD, k_BD, bank, T, True)
    similarity = q_BD @ torch.cat([k_BD, bank.n_KD]).T
    torch.testing.assert_close(result.positive_N, similarity.diagonal())
    rivals = similarity.clone()
    rivals.fill_diagonal_(-2)
    torch.testing.assert_close(result.hardest_N, rivals.amax(1))


def test_the_hardest_negative_is_not_the_own_key() -> None:
    run_ranks(1, hardest)


def shares_of_small_masses() -> list[float]:
    bank = make_bank("sharded", dist.get_world_size())
    bank.update([[BankUpdate(unit(B, D, seed=5).float(), torch.full((B,), 0.01))]], lr=0.0, seed=0)
    assert bank.stats
    mass_K = bank.stats.mass_K.clone()
    found = []
    for factor in (1.0, 1e-25, 0.0):
        bank.stats = bank.stats._replace(mass_K=mass_K * factor)
        found.append(bank.metrics()["bank_share"])
    return found


def test_the_share_of_negatives_that_have_no_weight() -> None:
    """Squares of these masses are 0 in fp32."""
    ((ordinary, small, none),) = run_ranks(1, shares_of_small_masses)
    assert small == pytest.approx(ordinary, rel=1e-3)
    assert none == 0


def statistics() -> tuple[dict[str, float], float, float]:
    bank = make_bank("sharded", dist.get_world_size())
    q_ND = unit(B, D, seed=5).float()
    before = bank.w_KD.clone()
    bank.update([[BankUpdate(q_ND, torch.full((B,), 0.01))]], lr=0.0, seed=0)
    assert torch.equal(bank.w_KD, before)
    assert bank.stats
    return bank.metrics(), float(bank.stats.mass_K.sum()), float(bank.stats.mass_K.square().sum())


def test_statistics_are_of_the_whole_bank() -> None:
    (metrics, _, _), (again, _, _) = run_ranks(2, statistics)
    ((one, mass, squares),) = run_ranks(1, statistics)
    assert metrics == again
    assert metrics == pytest.approx(one, rel=1e-5)
    assert one["bank_norm"] == pytest.approx(1.5)
    assert one["bank_share"] == pytest.approx(mass**2 / squares / K)
    assert 0 < one["bank_share"] < 1


def wrong_mesh() -> None:
    with pytest.raises(ValueError, match="node needs the same number of ranks on each node, got 3 ranks with 2"):
        make_mesh("node", CPU, 2)


def test_nodes_of_unequal_size_are_refused() -> None:
    run_ranks(3, wrong_mesh)
