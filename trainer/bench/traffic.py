"""Traffic of the negatives: bytes that each rank sends in a step, counted from the collectives that are issued.

Three formulations of the same step (contrastive loss, its gradient, and the adversary's step):

- `sharded`: ours; each of R ranks holds K/R rows of the bank.
- `replicated`: ours; each rank holds the bank and takes the same step, on the queries of all ranks.
- `published`: as AdCo's code (github.com/maple-research-lab/AdCo, training/train.py, update_network) does it; each rank
  holds the bank and computes its gradient, [K, D] in fp32, from its own queries, and the gradients are all-reduced.
  The computation is tiled here, which does not change what is sent.

Up to 8 ranks are real processes over gloo. More ranks are counted on rank 0 of a fake process group with fake tensors.

Shapes: N queries and as many keys over all ranks, N/R of them on each rank, K negatives, D dimensions.
"""

import os
import socket
import struct
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import kernels
from data.processes import fork_server
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, gather, make_mesh
from models.negatives.contrast import contrast
from trainer.bench.harness import environment, print_rows, print_table, write_result
from trainer.bench.kernels import PARAMS, TEMPERATURE
from trainer.plan.collectives import Collective, CollectiveTrace

FORMULATIONS = ("published", "replicated", "sharded")
DTYPES = (torch.float32, torch.bfloat16)

_MAX_PROCESSES = 8


class Case(NamedTuple):
    """One formulation at one size; dtype is that of queries, keys and unit rows, weights and velocity are fp32."""

    formulation: str
    rows: int
    negatives: int
    dim: int
    dtype: torch.dtype


class Count(NamedTuple):
    """What one rank sent in one step: its collectives, and the bytes that left by its TCP connections."""

    collectives: list[Collective]
    on_sockets: int


def run(rows: int, negatives: list[int], dim: int, ranks: list[int]) -> list[dict[str, Any]]:
    """Count every formulation for all numbers of negatives K and ranks R, in fp32 and bf16.

    Returns:
        One dictionary for each case: formulation, N, K, D, dtype, ranks; backend, gloo or fake; sent, the bytes that a
        rank sends in the ring algorithm, equal on all ranks; on_sockets, the bytes that gloo sent with its own
        algorithms, mean over ranks; collectives, as in `Collective`.

    Raises:
        ValueError: The queries or the bank cannot be divided among the ranks.
    """
    for count in ranks:
        if min(count, rows, dim) < 1 or rows % count:
            raise ValueError(f"bench traffic: got {rows} rows of {dim} for {count} ranks, need as many on each")
        for k in negatives:
            if (count - 1) * -(-k // count) >= k:
                raise ValueError(f"bench traffic: {k} negatives do not give each of {count} ranks at least one")
    results = []
    for count in track(ranks, "counting", console=Console(stderr=True)):
        cases = [Case(f, rows, k, dim, dtype) for k, dtype, f in product(negatives, DTYPES, FORMULATIONS)]
        real = count <= _MAX_PROCESSES
        for case, counts in zip(cases, _in_processes(cases, count) if real else _faked(cases, count), strict=True):
            collectives = counts[0].collectives
            assert all(c.collectives == collectives for c in counts), "ranks differ in what they send"
            results.append(
                {
                    "formulation": case.formulation,
                    "N": rows,
                    "K": case.negatives,
                    "D": dim,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "ranks": count,
                    "backend": "gloo" if real else "fake",
                    "sent": sum(c.sent for c in collectives),
                    "on_sockets": round(sum(c.on_sockets for c in counts) / count) if real else None,
                    "collectives": [c._asdict() for c in collectives],
                }
            )
    return results


def run_case(case: Case, fake: bool = False) -> tuple[Tensor, Count]:
    """Take one step of a case in the current process group, with fake tensors (without values) if asked for.

    Returns:
        The weights that this rank holds after the step, and what it sent.
    """
    mesh = make_mesh("sharded" if case.formulation == "sharded" else "replicated", torch.device("cpu"), 1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = slice(rank * case.rows // world_size, (rank + 1) * case.rows // world_size)
    with FakeTensorMode() if fake else nullcontext():
        generator = torch.Generator().manual_seed(0)  # the same bank, queries and keys on all ranks
        w_KD = torch.randn(case.negatives, case.dim, generator=generator)
        q_ND, k_BD = (
            F.normalize(torch.randn(case.rows, case.dim, generator=generator), dim=1)[own].to(case.dtype)
            for _ in range(2)
        )
        if case.formulation == "published":
            v_KD = torch.zeros_like(w_KD)
            step = partial(_take_published_step, q_ND, k_BD, w_KD, v_KD, mesh.get_group("replica"))
        else:
            settings = BankSettings(size=case.negatives, **PARAMS._asdict())
            bank = Bank(settings, case.dim, mesh, case.dtype)
            bank.fill(w_KD[bank.first : bank.first + len(bank.w_KD)])
            w_KD = bank.w_KD
            step = partial(_take_bank_step, q_ND.requires_grad_(), k_BD, bank)
        dist.barrier()
        before = _socket_bytes()
        with CollectiveTrace() as trace:
            step()
        after = _socket_bytes()
        dist.barrier()
    return w_KD, Count(trace.collectives, after - before)


def report(results: list[dict[str, Any]], out: Path | None) -> None:
    """Print the results of `run` and the collectives of the last setting as tables, and write all to `out` as JSON."""
    _print_bytes(results)
    _print_collectives(results)
    write_result(out, {**environment(), "rows": results})


def _take_bank_step(q_ND: Tensor, k_BD: Tensor, bank: Bank) -> None:
    result = contrast(q_ND, k_BD, bank, TEMPERATURE, batch_keys=True)
    result.loss_N.sum().backward()
    bank.update([[result.bank_update(1 / (len(q_ND) * dist.get_world_size()))]], PARAMS.lr, seed=0)


def _take_published_step(q_ND: Tensor, k_BD: Tensor, w_KD: Tensor, v_KD: Tensor, group: dist.ProcessGroup) -> None:
    """Take the published code's step in place, on a bank that all ranks of the group hold."""
    k_MD = gather(k_BD, group)
    own_N = torch.arange(len(q_ND)) + group.rank() * len(k_BD)
    n_KD = F.normalize(w_KD, dim=1).to(q_ND.dtype)
    score = kernels.score(q_ND, k_MD, own_N, n_KD, TEMPERATURE, PARAMS.temperature)
    # From zero velocity and with all rates 0, our step leaves the negative gradient in the velocity.
    g_KD = torch.zeros_like(w_KD)
    params = kernels.AdversaryParams(PARAMS.temperature, lr=0.0, momentum=0.0, weight_decay=0.0)
    kernels.adversary_step(q_ND, 1 / (score.za_N * len(q_ND)), n_KD, w_KD, g_KD, params)
    if group.size() > 1:
        dist.all_reduce(g_KD, group=group)
    v_KD.mul_(PARAMS.momentum).add_(g_KD, alpha=1 / group.size()).add_(w_KD, alpha=PARAMS.weight_decay)
    w_KD.sub_(v_KD * PARAMS.lr)


def _in_processes(cases: list[Case], ranks: int) -> list[list[Count]]:
    """Return for each case the counts of all ranks, each a process of one gloo group on this machine."""
    context = fork_server([__name__])  # imports torch once instead of once per rank
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, context) as pool:
        store = (Path(folder) / "store").as_uri()
        # Each task waits for all others to join the group, so no process takes two of them.
        tasks = [pool.submit(_run_rank, cases, rank, ranks, store) for rank in range(ranks)]
        return [list(counts) for counts in zip(*(task.result() for task in tasks), strict=True)]


def _run_rank(cases: list[Case], rank: int, ranks: int, store: str) -> list[Count]:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    try:
        return [run_case(case)[1] for case in cases]
    finally:
        dist.destroy_process_group()


def _faked(cases: list[Case], ranks: int) -> list[list[Count]]:
    """Return for each case the count of rank 0 of a fake group; nothing is computed or sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return [[run_case(case, fake=True)[1]] for case in cases]
    finally:
        dist.destroy_process_group()


def _socket_bytes() -> int:
    """Return the payload that this process has sent by its open TCP connections (struct tcp_info of linux/tcp.h)."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if not link.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(link.name))) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                (waiting,) = struct.unpack_from("I", info, 144)  # tcpi_notsent_bytes
                sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
                total += waiting + sent - again
    return total


def _setting(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[key] for key in ("ranks", "K", "dtype"))


def _print_bytes(results: list[dict[str, Any]]) -> None:
    """Print a section for each setting, in 10^6 bytes, with the ratio to the sharded bank."""
    table: list[tuple[str, ...]] = []
    for (ranks, negatives, dtype), group in groupby(results, key=_setting):
        setting = list(group)
        sharded = next(result["sent"] for result in setting if result["formulation"] == "sharded")
        for result in setting:
            ratio = f"{result['sent'] / sharded:.2f} x" if sharded else ""
            by_gloo = "" if result["on_sockets"] is None else f"{result['on_sockets'] / 1e6:,.3f}"
            sent = f"{result['sent'] / 1e6:,.3f}"
            table.append((result["formulation"], dtype, str(ranks), f"{negatives:,}", sent, ratio, by_gloo))
        table.append(())
    print_table(
        f"Sent by a rank in a step, N = {results[0]['N']}, D = {results[0]['D']}",
        ("formulation", "queries", "ranks", "K", "MB", "of sharded", "MB by gloo"),
        table,
        text_columns=2,
    )


def _print_collectives(results: list[dict[str, Any]]) -> None:
    """Print each collective of the last setting."""
    ranks, negatives, dtype = _setting(results[-1])
    last = [result for result in results if _setting(result) == (ranks, negatives, dtype)]
    print_rows(
        f"Collectives of {ranks} ranks, K = {negatives:,}, {dtype}",
        {
            "formulation": lambda call: call["formulation"],
            "collective": lambda call: call["operator"],
            "input": lambda call: " x ".join(map(str, call["shape"])),
            "type": lambda call: call["dtype"],
            "ranks": lambda call: str(call["ranks"]),
            "bytes sent": lambda call: f"{call['sent']:,}",
        },
        [call | {"formulation": result["formulation"]} for result in last for call in result["collectives"]],
        text_columns=4,
    )
