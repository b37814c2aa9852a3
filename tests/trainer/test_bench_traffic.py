"""Counted traffic: every collective is counted, and the traffic of the sharded bank does not depend on its size."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.compat import reduce_scatter_single
from tests.ranks import run_ranks
from trainer.bench import traffic
from trainer.bench.traffic import Case, Count
from trainer.plan.collectives import Collective, CollectiveTrace


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def faked(case: Case, ranks: int) -> Count:
    with fake_group(ranks):
        return traffic.run_case(case, fake=True)[1]


def test_the_sharded_bank_sends_a_twentieth() -> None:
    """At N = 4096, D = 128, K = 65,536, 64 ranks and bf16 queries; ours sends the same at any K."""
    sent = {
        (name, negatives): sum(c.sent for c in faked(Case(name, 4096, negatives, 128, torch.bfloat16), 64).collectives)
        for name in traffic.FORMULATIONS
        for negatives in (65536, 2**20)
    }
    # By hand, from the inputs of a rank: 64 queries of bf16, 4096 sums [130] of fp32, and twice 4096 of fp32.
    assert sent["sharded", 65536] == 63 * 64 * 128 * 2 + 63 * (4096 * 130 * 4) // 64 + 2 * (2 * 63 * 4096 * 4 // 64)
    assert sent["published", 65536] == 63 * 64 * 128 * 2 + 2 * 63 * (65536 * 128 * 4) // 64
    assert sent["published", 65536] / sent["sharded", 65536] == pytest.approx(21.01, abs=0.005)
    for ours in ("sharded", "replicated"):
        assert sent[ours, 65536] == sent[ours, 2**20]
    assert sent["published", 2**20] > 15 * sent["published", 65536]


def all_formulations(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, Count]]:
    return {name: traffic.run_case(Case(name, 8, 37, 4, dtype)) for name in traffic.FORMULATIONS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_collective_on_two_ranks(dtype: torch.dtype) -> None:
    """N = 8, D = 4: 4 queries and keys a rank. All formulations take the same step."""
    first, second = run_ranks(2, all_formulations, dtype)
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    queries = Collective("all_gather", (4, 4), name, 2, 16 * size)
    expected = {
        "sharded": [
            queries,
            Collective("reduce_scatter", (8, 6), "float32", 2, 96),
            Collective("all_reduce", (2, 8), "float32", 2, 64),
        ],
        "replicated": [queries, queries, Collective("all_gather", (4,), "float32", 2, 16)],
        "published": [queries, Collective("all_reduce", (37, 4), "float32", 2, 37 * 4 * 4)],
    }
    w_KD = torch.cat([first["sharded"][0], second["sharded"][0]])
    for formulation, collectives in expected.items():
        for w_mine_KD, count in (first[formulation], second[formulation]):
            assert count.collectives == collectives, formulation
            assert faked(Case(formulation, 8, 37, 4, dtype), 2).collectives == collectives, "the fake group differs"
            if formulation != "sharded":
                torch.testing.assert_close(w_mine_KD, w_KD, rtol=1e-5, atol=1e-5)
            # gloo reduces and scatters by an all-reduce, and each message has a header of 48 bytes.
            as_gloo = sum(2 * c.sent if c.operator == "reduce_scatter" else c.sent for c in collectives)
            headers, rest = divmod(count.on_sockets - as_gloo, 48)
            assert rest == 0
            assert 0 < headers < 20 * len(collectives)


def test_a_step_moves_the_bank() -> None:
    """The agreement of the formulations above means something only if the step changes the bank."""
    (count,) = run_ranks(1, all_formulations, torch.float32)
    start_KD = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
    for w_KD, sent in count.values():
        assert (w_KD - start_KD).abs().max() > 0.01
        assert sent == Count([], 0)


x = torch.ones(8, 3)  # 96 bytes
FORMS: dict[str, tuple[Callable[[], Any], str, int]] = {
    "all_gather of a list": (lambda: dist.all_gather([torch.empty_like(x) for _ in range(4)], x), "all_gather", 288),
    "reduce_scatter": (lambda: reduce_scatter_single(torch.empty(2, 3), x), "reduce_scatter", 72),
    "all_reduce later": (lambda: dist.all_reduce(x, async_op=True).wait(), "all_reduce", 144),
    "broadcast": (lambda: dist.broadcast(x, 0), "broadcast", 96),
    "all_to_all": (lambda: dist.all_to_all_single(torch.empty_like(x), x), "all_to_all", 72),
    "uneven all_to_all": (
        lambda: dist.all_to_all_single(torch.empty_like(x), x, [2, 2, 2, 2], [5, 1, 2, 0]),
        "all_to_all",
        36,
    ),
    "functional": (lambda: functional.all_reduce(x, "sum", init_device_mesh("cpu", (4,))).sum(), "all_reduce", 144),
    "of a DTensor": (
        lambda: distribute_tensor(x, init_device_mesh("cpu", (4,)), [Shard(0)], src_data_rank=None).full_tensor(),
        "all_gather",
        72,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_issue_a_collective(form: str) -> None:
    action, operator, sent = FORMS[form]
    with fake_group(4), CollectiveTrace() as trace:
        action()
        dist.barrier()
    assert [(c.operator, c.ranks, c.sent) for c in trace.collectives] == [(operator, 4, sent)]


def backward(wrap: Callable[..., Any]) -> list[Collective]:
    """Return the collectives of forward and backward of a network of 64 fp32 weights."""
    network = wrap(nn.Sequential(nn.Linear(8, 8, bias=False)))
    with CollectiveTrace() as trace:
        network(torch.ones(2, 8)).sum().backward()
    return trace.collectives


def test_collectives_of_wrapped_networks() -> None:
    """DDP's bucket, which C++ reduces (but not on a fake group); FSDP2's all-gather and reduce-scatter."""
    for collectives in run_ranks(2, backward, DistributedDataParallel):
        assert collectives == [Collective("all_reduce", (64,), "float32", 2, 256)]
    with fake_group(4):
        assert backward(fully_shard) == [
            Collective("all_gather", (16,), "float32", 4, 192),
            Collective("reduce_scatter", (64,), "float32", 4, 192),
        ]


def test_unknown_collectives_are_refused() -> None:
    with (
        fake_group(2),
        CollectiveTrace(),
        pytest.raises(NotImplementedError, match=r"c10d.send.default: the number of bytes that it sends is unknown"),
    ):
        dist.send(x, 1)


@pytest.mark.slow
def test_results_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = traffic.run(32, [64], 8, [2, 16])
    assert [(r["ranks"], r["backend"]) for r in results] == [(2, "gloo")] * 6 + [(16, "fake")] * 6
    for result in results:
        assert result["sent"] == sum(call["sent"] for call in result["collectives"]) > 0
        assert (result["on_sockets"] or 0) >= (result["sent"] if result["backend"] == "gloo" else 0)
    traffic.report(results, tmp_path / "out/traffic.json")
    assert json.loads((tmp_path / "out/traffic.json").read_text())["rows"] == json.loads(json.dumps(results))
    printed = capsys.readouterr().out
    assert "reduce_scatter" in printed
    assert "32 x 10" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, [64], 8, [4]), "10 rows of 8 for 4 ranks, need as many on each"),
        ((8, [64], 8, [0]), "8 rows of 8 for 0 ranks"),
        ((8, [64, 5], 8, [4]), "5 negatives do not give each of 4 ranks at least one"),
    ],
)
def test_uneven_division_is_refused(arguments: tuple[int, list[int], int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traffic.run(*arguments)
