"""Every method's loss and gradient against a plain fp64 formula, on one rank and several; and its queue.

B images over all ranks, V views, D dimensions, K negatives.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import acssl, adco, byol, caco, moco, simclr
from models.acssl import triplet
from models.encoder import Encoder
from models.method import Method, Views
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, Placement, make_mesh
from models.negatives.queue import Queue
from tests.ranks import run_ranks
from trainer.run import checkpoint

B, D, K = 12, 16, 40
CPU = torch.device("cpu")
NETWORK = cast(Encoder, nn.Identity())  # the tests give embeddings


def unit(*shape: int, seed: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(x, dim=-1)


def embeddings(views: int) -> tuple[Tensor, Tensor]:
    """Return queries and keys of all ranks' images [V, B, D]; those of one image are similar."""
    centre = unit(B, D, seed=0)
    q, k = (nn.functional.normalize(centre + 0.7 * unit(views, B, D, seed=s), dim=-1) for s in (1, 2))
    return q, k


def make_queue(dtype: torch.dtype = torch.float64, placement: Placement = "sharded") -> Queue:
    mesh = make_mesh(placement, CPU, dist.get_world_size())
    return Queue(BankSettings(size=K), D, mesh, dtype, seed=5)


def make_bank(placement: Placement = "sharded") -> Bank:
    settings = BankSettings(size=K, temperature=0.1, momentum=0.9, weight_decay=0.0)
    bank = Bank(settings, D, make_mesh(placement, CPU, dist.get_world_size()), torch.float64)
    bank.fill(unit(K, D, seed=3)[bank.first : bank.first + len(bank.w_KD)])
    return bank


def make(name: str, **settings: Any) -> Method:
    if name == "adco":
        return adco.AdCo(NETWORK, adco.Settings(**settings), make_bank())
    if name == "caco":
        kind_of_bank = BankSettings(size=K, temperature=0.1, momentum=0.9, weight_decay=0.0)
        rows = caco.CooperativeBank(kind_of_bank, D, make_mesh("sharded", CPU, dist.get_world_size()), torch.float64)
        rows.fill(unit(K, D, seed=3)[rows.first : rows.first + len(rows.w_KD)])
        return caco.CaCo(NETWORK, caco.Settings(**settings), rows)
    if name == "moco":
        return moco.MoCo(NETWORK, moco.Settings(**settings), make_queue())
    if name == "simclr":
        return simclr.SimCLR(NETWORK, simclr.Settings(**settings))
    if name == "byol":
        return byol.BYOL(NETWORK, byol.Settings(**settings))
    kind = acssl.Settings(**settings)
    negatives = {"keys": None, "queue": make_queue, "bank": make_bank}[kind.negatives_from]
    return acssl.ACSSL(NETWORK, kind, negatives() if negatives else None)


class Outcome(NamedTuple):
    """The mean loss over ranks, and its gradient with respect to this rank's queries, [V, B / ranks, D]."""

    loss: float
    dq: Tensor
    metrics: dict[str, float]


def run_method(name: str, views: int, settings: dict[str, Any]) -> Outcome:
    method = make(name, **settings)
    q, k = embeddings(views)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
    q = q[:, mine].clone().requires_grad_()
    queries: Views = {i: q[i] for i in method.query_views(views)}
    result = method.loss(queries, {j: k[j, mine] for j in method.key_views})
    (dq,) = torch.autograd.grad(result.loss, q, allow_unused=True)
    loss = result.loss.detach().clone()
    dist.all_reduce(loss)
    return Outcome(float(loss) / world_size, dq / world_size, {n: float(x) for n, x in result.metrics.items()})


# The formulas, for all images on one rank.


def nt_xent(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    z = q.flatten(0, 1)
    terms = []
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        others = [j for j in range(2 * B) if j != i]
        logits = z[i] @ z[others].T / temperature
        terms.append(torch.logsumexp(logits, 0) - z[i] @ z[partner] / temperature)
    return torch.stack(terms).mean()


def info_nce(q: Tensor, k: Tensor, temperature: float, pairs: list[tuple[int, int]]) -> Tensor:
    (n, _) = run_ranks(1, queue_rows)[0]
    terms = []
    for i, j in pairs:
        positive = (q[i] * k[j]).sum(1, keepdim=True) / temperature
        logits = torch.cat([positive, q[i] @ n.T / temperature], 1)
        terms.append(nn.functional.cross_entropy(logits, torch.zeros(B, dtype=torch.int64)))
    return torch.stack(terms).sum()


def nearest_rows(q: Tensor, k: Tensor, temperature: float, large: float, small: float) -> Tensor:
    """CaCo: the positive of a query is the row of the bank that is most similar to the key."""
    n = unit(K, D, seed=3)
    total = torch.zeros((), dtype=torch.float64)
    for j in (0, 1):
        for i in [i for i in range(len(q)) if i != j]:
            loss = nn.functional.cross_entropy(q[i] @ n.T / temperature, (k[j] @ n.T).argmax(1))
            total = total + (large if i < 2 else small) * loss
    return total


def predict(q: Tensor, k: Tensor) -> Tensor:
    """BYOL, eq. 2, for both key views; with more views the mean over the queries of a key."""
    total = torch.zeros((), dtype=torch.float64)
    for j in (0, 1):
        others = [i for i in range(len(q)) if i != j]
        for i in others:
            total = total + (2 - 2 * (q[i] * k[j]).sum(1)).mean() / len(others)
    return total


def mined_triplets(
    q: Tensor, k: Tensor, form: str, margin: float, temperature: float, m: int, below: float, skip: int,
    extra: Tensor | None, pair: float, weight: float,
) -> Tensor:  # fmt: skip
    terms = []
    for j in (0, 1):
        columns = k[j] if extra is None else torch.cat([k[j], extra])
        for i in [i for i in range(len(q)) if i != j]:
            for b in range(B):
                s = columns @ q[i, b]
                positive = s[b]
                candidates = sorted(
                    (c for c in range(len(columns)) if c != b and s[c].item() < below), key=lambda c: (-s[c].item(), c)
                )[skip : skip + m]
                v = s[candidates] - positive + margin
                if form == "soft":
                    loss = torch.log1p(torch.exp(v / temperature).sum())
                else:
                    loss = v.clamp(min=0).mean() if len(v) else torch.zeros((), dtype=torch.float64)
                terms.append(pair * (2 - 2 * positive) + weight * loss)
    return torch.stack(terms).mean()


def queue_rows() -> tuple[Tensor, int]:
    queue = make_queue()
    return queue.n_KD, int(queue.pointer)


ACSSL = {"temperature": 0.3, "margin": 0.1, "hardest": 5, "pair_weight": 0.5, "triplet_weight": 2.0}
MINED: dict[str, Any] = {"margin": 0.1, "temperature": 0.3, "m": 5, "pair": 0.5, "weight": 2.0}
FREE: dict[str, Any] = {"below": 2.0, "skip": 0, "extra": None}
CASES: list[tuple[str, int, dict[str, Any], Any]] = [
    ("simclr", 2, {"temperature": 0.2}, lambda q, k: nt_xent(q, k, 0.2)),
    ("moco", 2, {"temperature": 0.3}, lambda q, k: info_nce(q, k, 0.3, [(1, 0)])),
    ("moco", 2, {"temperature": 0.3, "symmetric": True}, lambda q, k: info_nce(q, k, 0.3, [(1, 0), (0, 1)])),
    ("caco", 2, {"temperature": 0.3}, lambda q, k: nearest_rows(q, k, 0.3, 1, 0)),
    ("caco", 4, {"temperature": 0.3, "directions": "mean"}, lambda q, k: nearest_rows(q, k, 0.3, 0.5, 0.25)),
    ("byol", 2, {}, predict),
    ("byol", 3, {}, predict),
    ("acssl", 2, ACSSL, lambda q, k: mined_triplets(q, k, "soft", **{**MINED, **FREE})),
    ("acssl", 3, {**ACSSL, "form": "margin"}, lambda q, k: mined_triplets(q, k, "margin", **{**MINED, **FREE})),
    (
        "acssl",
        2,
        {**ACSSL, "negatives_from": "queue", "guard": 0.4},
        lambda q, k: mined_triplets(
            q, k, "soft", **{**MINED, **FREE, "below": 0.4, "extra": run_ranks(1, queue_rows)[0][0]}
        ),
    ),
    (
        "acssl",
        2,
        {**ACSSL, "negatives_from": "bank", "guard_top": 0.06},
        # 11 keys and 40 negatives: a share of 0.06 of 51 columns is 3
        lambda q, k: mined_triplets(q, k, "soft", **{**MINED, **FREE, "skip": 3, "extra": unit(K, D, seed=3)}),
    ),
    (
        "acssl",
        2,
        {**ACSSL, "form": "margin", "guard": -0.9},  # the guard leaves out all columns
        lambda q, k: mined_triplets(q, k, "margin", **{**MINED, **FREE, "below": -0.9}),
    ),
    (
        "acssl",
        2,
        {**ACSSL, "hardest": 0},
        lambda q, k: mined_triplets(q, k, "soft", **{**MINED, **FREE, "weight": 0.0}),
    ),
]


def run_all() -> list[Outcome]:
    return [run_method(name, views, settings) for name, views, settings, _ in CASES]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_agree_with_the_formula(world_size: int) -> None:
    """The gradient is that of the mean over ranks, and includes the effect of a rank's keys on other losses."""
    ranks = run_ranks(world_size, run_all)
    for number, (name, views, settings, formula) in enumerate(CASES):
        q, k = embeddings(views)
        q.requires_grad_()
        loss = formula(q, k)
        (dq,) = torch.autograd.grad(loss, q)
        outcomes = [rank[number] for rank in ranks]
        for outcome in outcomes:
            assert outcome.loss == pytest.approx(loss.item(), rel=1e-9), (name, settings)
            assert all(torch.isfinite(torch.tensor(x)) for x in outcome.metrics.values())
        found = torch.cat([outcome.dq for outcome in outcomes], 1)
        torch.testing.assert_close(found, dq, rtol=1e-7, atol=1e-9, msg=f"{name} {settings}")


def test_the_forms_of_the_triplet() -> None:
    positive, negative = torch.tensor([0.5, 0.9]), torch.tensor([[0.6, 0.2], [0.1, -torch.inf]])
    assert triplet(positive, negative, "margin", 0.2, 1.0).tolist() == pytest.approx([0.15, 0.0])
    soft = triplet(positive, torch.tensor([[0.6, 0.4], [-torch.inf, -torch.inf]]), "soft", 0.5, 1.0)
    assert soft.tolist() == pytest.approx([torch.log1p(torch.tensor([0.6, 0.4]).exp().sum()).item(), 0.0])


def test_what_settings_say_about_negatives() -> None:
    bank = BankSettings(size=1000)
    for settings, name, number, description in (
        (adco.Settings(), "bank", 1000, "1,000, learning rate 3, temperature 0.02"),
        (caco.Settings(), "bank", 1000, "1,000, learning rate 3, temperature 0.02"),
        (moco.Settings(), "queue", 1000, "1,000"),
        (acssl.Settings(negatives_from="queue"), "queue", 1000, "1,000"),
        (acssl.Settings(), None, 0, None),
        (simclr.Settings(), None, 0, None),
        (byol.Settings(), None, 0, None),
    ):
        kind = settings.negatives_class
        assert (kind.name if kind else None) == name
        assert settings.num_negatives(bank) == number
        assert settings.describe_negatives(bank) == description
        assert (settings.negatives_flops(bank, D) > 0) == (number > 0)
        assert all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in settings.papers)
        assert settings.papers
        assert all(field.description for field in type(settings).model_fields.values())


# The queue.


def fill_queue(placement: Placement, ranks_per_node: int, puts: int) -> tuple[Tensor, int, int]:
    """Return a queue whose keys have 1000 * step + index in the global batch as their first element."""
    queue = Queue(BankSettings(size=K), 4, make_mesh(placement, CPU, ranks_per_node), seed=5)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(puts):
        keys = []
        for view in range(2):
            k_BD = torch.zeros(B // world_size, 4)
            k_BD[:, 0] = (
                1000 * step + 100 * view + torch.arange(B)[rank * B // world_size : (rank + 1) * B // world_size]
            )
            keys.append(k_BD)
        queue.update([keys])
    return queue.n_KD, int(queue.pointer), queue.first


@pytest.mark.parametrize(
    ("world_size", "placement", "ranks_per_node"),
    [(1, "sharded", 1), (3, "sharded", 3), (2, "replicated", 2), (4, "node", 2)],
)
def test_the_queue_is_first_in_first_out_over_ranks(world_size: int, placement: Placement, ranks_per_node: int) -> None:
    order = [1000 * step + 100 * view + b for step in range(3) for view in range(2) for b in range(B)]
    expected = torch.empty(K)
    for i, number in enumerate(order):  # 72 keys for 40 rows
        expected[i % K] = number
    for n_KD, pointer, first in run_ranks(world_size, fill_queue, placement, ranks_per_node, 3):
        assert pointer == 3 * 2 * B % K
        assert torch.equal(n_KD[:, 0], expected[first : first + len(n_KD)])


def start_of_queue() -> tuple[Tensor, int]:
    queue = Queue(BankSettings(size=600), 4, make_mesh("sharded", CPU, 1), seed=5)
    return queue.n_KD, queue.first


def test_the_queue_starts_equal_on_any_number_of_ranks() -> None:
    ((whole, _),) = run_ranks(1, start_of_queue)
    parts = run_ranks(3, start_of_queue)
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(600))
    assert len(whole.unique(dim=0)) == 600


def own_positives() -> list[float]:
    """Return the hardest similarities of two symmetric steps on the same images, with keys equal to queries."""
    method = make("moco", symmetric=True)
    x = unit(2, B, D, seed=9)
    hardest = []
    for _ in range(2):
        result = method.loss({0: x[0], 1: x[0]}, {0: x[0], 1: x[0]})
        hardest.append(float(result.metrics["hardest_similarity"]))
        method.update_negatives([result.negatives_update], 0.0, 0)
    return hardest


def test_own_keys_become_negatives_only_after_the_step() -> None:
    """Both directions of the symmetric loss are computed before any key enters the queue."""
    hardest = run_ranks(1, own_positives)[0]
    assert hardest[0] < 0.95
    assert hardest[1] == pytest.approx(1)


# Student and teacher.


def byol_step() -> dict[str, bool]:
    torch.manual_seed(0)
    channels = {"channels": (8, 8, 8, 16), "layers": (1, 1, 1, 1)}
    student = Encoder("resnet18", dim=D, head_norm=True, predictor=8, backbone_args=channels)
    method = byol.Settings(bn="local").make(student, None)
    assert method.teacher
    views = [torch.rand(6, 3, 32, 32) for _ in range(2)]
    before = {name: x.clone() for name, x in method.teacher.state_dict().items()}
    method.forward_step(student, views).loss.backward()
    assert student.predictor
    return {
        "the teacher has no predictor": not any("predictor" in name for name in before),
        "no gradient to the teacher": all(p.grad is None for p in method.teacher.parameters()),
        "a gradient to the predictor": all(p.grad is not None for p in student.predictor.parameters()),
        "the teacher's buffers change only in the step": all(
            torch.equal(x, before[name]) for name, x in method.teacher.state_dict().items() if "running" in name
        ),
        "the teacher in training mode": method.teacher.training,
        "the predictor in training mode": student.predictor.training,
    }


def test_only_the_student_has_a_predictor_and_learns() -> None:
    facts = run_ranks(1, byol_step)[0]
    assert all(facts.values()), facts


def test_byol_without_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.predictor: byol needs one"):
        byol.Settings().make(Encoder("resnet18", backbone_args={"channels": (8, 8, 8, 16)}), None)


def test_predictions_are_no_keys() -> None:
    student = Encoder("resnet18", predictor=8, backbone_args={"channels": (8, 8, 8, 16)})
    with pytest.raises(ValueError, match=r"model\.predictor: needs a teacher"):
        adco.Settings(teacher=False, symmetric=True, bn="sync").make(student, None)


def simsiam() -> tuple[float, float]:
    """Return the loss of the example in docs/methods.md, and its formula."""
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {**vars(byol)}
    exec(code, names)
    q, k = embeddings(2)
    output = names["Settings"]().make(NETWORK, None).loss(dict(enumerate(q)), dict(enumerate(k)))
    return float(output.loss), float(-((q[0] * k[1]).sum(1).mean() + (q[1] * k[0]).sum(1).mean()) / 2)


def test_the_example_of_the_documentation_works() -> None:
    loss, expected = run_ranks(1, simsiam)[0]
    assert loss == pytest.approx(expected)


def make_short_queue(dtype: torch.dtype) -> Queue:
    return Queue(BankSettings(size=K), 4, make_mesh("sharded", CPU, 1), dtype, seed=7)


def save_queue(folder: Path) -> tuple[Tensor, int]:
    queue = make_short_queue(torch.bfloat16)
    queue.update([[unit(B, 4, seed=step)[: B // 2].float() for step in range(3)]])
    assert checkpoint.save(folder, 1, {"queue": queue.state_dict()}, keep=1)
    return queue.n_KD, int(queue.pointer)


def load_queue(folder: Path) -> tuple[Tensor, int]:
    """Load into another dtype, as for a run that continues on another device."""
    queue = make_short_queue(torch.float32)
    checkpoint.load(folder / "step-00000001", {"queue": queue.state_dict()})
    return queue.n_KD, int(queue.pointer)


def test_a_queue_is_loaded_on_another_number_of_ranks(tmp_path: Path) -> None:
    saved = run_ranks(2, save_queue, tmp_path)
    loaded = run_ranks(3, load_queue, tmp_path)
    assert torch.equal(torch.cat([n for n, _ in loaded]), torch.cat([n for n, _ in saved]).float())
    assert {pointer for _, pointer in [*saved, *loaded]} == {3 * B}
