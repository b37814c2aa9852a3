"""Mining against a brute-force list of all columns, for ranks and placements, with ties, guard and skipping."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import chunked, ops, reference
from models.negatives import mining
from models.negatives.base import BankSettings, Placement, make_mesh
from models.negatives.mining import mine
from models.negatives.queue import Queue
from tests.ranks import run_ranks

B, D, K, VIEWS, M = 12, 16, 37, 2, 6  # images over all ranks; K is divisible by no number of ranks
CPU = torch.device("cpu")
CASES: list[
    tuple[str, int, float, bool]
] = [  # kernels, skipped columns, guard, whether there are negatives besides the keys
    ("reference", 0, torch.inf, True),
    ("chunked", 0, 0.25, True),
    ("chunked", 4, 0.5, True),
    ("reference", 2, torch.inf, False),
    ("chunked", 0, -0.125, False),  # some queries have fewer than M columns
]


def vectors(count: int, seed: int) -> Tensor:
    """Return unit rows of ±1/4: their similarities are exact multiples of 1/8, and many are equal."""
    return torch.randint(0, 2, (count, D), generator=torch.Generator().manual_seed(seed)).double() / 2 - 0.25


class Mined(NamedTuple):
    similarity: Tensor
    number: Tensor
    dq: Tensor


def run(placement: Placement, ranks_per_node: int) -> list[Mined]:
    mining._ROWS = 5  # so that columns are weighed in several chunks
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine_of = slice(rank * B // world_size, (rank + 1) * B // world_size)
    found = []
    for kernels, skip, below, beside in CASES:
        ops.chunked = reference if kernels == "reference" else chunked
        queue = None
        if beside:
            mesh = make_mesh(placement, CPU, ranks_per_node)
            queue = Queue(BankSettings(size=K), D, mesh, torch.float64)
            queue.n_KD.copy_(vectors(K, seed=3)[queue.first : queue.first + len(queue.n_KD)])
        q_ND = torch.cat([vectors(B, seed=10 + view)[mine_of] for view in range(VIEWS)]).requires_grad_()
        similarity_Nm, number_Nm = mine(q_ND, vectors(B, seed=2)[mine_of], queue, M, skip=skip, below=below)
        weights_Nm = torch.arange(1, M + 1) * torch.ones_like(similarity_Nm)
        loss = torch.where(number_Nm >= 0, similarity_Nm * weights_Nm, 0).sum()
        (dq,) = torch.autograd.grad(loss, q_ND)
        found.append(Mined(*(x.detach().view(VIEWS, -1, *x.shape[1:]) for x in (similarity_Nm, number_Nm, dq))))
    return found


def expected(skip: int, below: float, beside: bool) -> Mined:
    columns = torch.cat([vectors(B, seed=2), vectors(K, seed=3)]) if beside else vectors(B, seed=2)
    similarity = torch.full((VIEWS, B, M), -torch.inf, dtype=torch.float64)
    number = torch.full((VIEWS, B, M), -1)
    dq = torch.zeros(VIEWS, B, D, dtype=torch.float64)
    for view in range(VIEWS):
        for b, q_D in enumerate(vectors(B, seed=10 + view)):
            s = (q_D @ columns.T).tolist()
            order = sorted((-s[c], c) for c in range(len(s)) if c != b and s[c] < below)
            for slot, (_, c) in enumerate(order[skip : skip + M]):
                similarity[view, b, slot], number[view, b, slot] = s[c], c
                dq[view, b] += (slot + 1) * columns[c]
    return Mined(similarity, number, dq)


@pytest.mark.parametrize(
    ("world_size", "placement", "ranks_per_node"),
    [(1, "sharded", 1), (2, "sharded", 2), (3, "sharded", 3), (2, "replicated", 2), (4, "node", 2)],
)
def test_mined_as_a_sorted_list_of_all_columns(world_size: int, placement: str, ranks_per_node: int) -> None:
    ranks = run_ranks(world_size, run, placement, ranks_per_node)
    ties = fewer = 0
    for number, (_, skip, below, beside) in enumerate(CASES):
        truth = expected(skip, below, beside)
        found = Mined(*(torch.cat(parts, 1) for parts in zip(*(rank[number] for rank in ranks), strict=True)))
        torch.testing.assert_close(found.similarity, truth.similarity)
        assert torch.equal(found.number, truth.number), CASES[number]
        torch.testing.assert_close(found.dq, truth.dq)
        ties += int((truth.similarity.diff(dim=-1).abs() < 1e-9).sum())
        fewer += int((truth.number < 0).any(-1).sum())
    assert ties > 100
    assert fewer > 5


def rounded() -> tuple[Tensor, Tensor]:
    queue = Queue(BankSettings(size=K), D, make_mesh("sharded", CPU, 1), torch.bfloat16)
    q_ND, k_BD = (
        nn.functional.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(s))) for s in (1, 2)
    )
    similarity_Nm, number_Nm = mine(q_ND, k_BD, queue, M)
    columns = torch.cat([k_BD.bfloat16(), queue.n_KD]).float()
    return similarity_Nm, torch.gather(q_ND.bfloat16().float() @ columns.T, 1, number_Nm)


def test_a_queue_in_bf16() -> None:
    similarity, again = run_ranks(1, rounded)[0]
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, again, rtol=0, atol=1e-6)
