"""Preflight: compares the nodes of a job before it trains and names those that lack something, differ, or are slow.

Each node reports its versions, free GPU memory, disk and clock through torchrun's store, and tests plain connections to
a few other nodes. Only if that finds no fault do the nodes form a process group and measure matrix products and
all-reduces, because a process group would hang on a broken network.
"""

import json
import math
import os
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from trainer import distributed
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.ops.doctor import print_checks, run_checks
from trainer.ops.node_checks import find_problems, find_versions, free_memory, node_address, node_name
from trainer.ops.watchdog import Watchdog

MAX_CLOCK_DIFFERENCE = 5.0  # seconds
SLOW_FACTOR = 3.0  # a node that is slower than the median node by this factor is at fault
_RANDOM_PEERS = 3  # nodes to which each node connects besides the next one
_SHOWN_DIFFERENCES = 5  # per node
_TIMEOUT = 180.0  # seconds for any step that needs all nodes
_CONNECT_TIMEOUT = 10.0  # seconds
_REPEATS = 5  # of each measurement; the fastest counts


class NodeReport(NamedTuple):
    """The report of one node.

    Attributes:
        name: Name of the node.
        versions: Values that must be equal on all nodes, by name.
        problems: What the node lacks, one sentence each.
        clock: Seconds by which its clock is ahead of the first node's.
        memory: Free host memory in GiB.
        connections: Whether it could connect to each of its peers, by their names.
        speeds: Measurements by name; higher is better.
    """

    name: str
    versions: dict[str, str]
    problems: list[str]
    clock: float
    memory: float
    connections: dict[str, bool]
    speeds: dict[str, float]


class Fault(NamedTuple):
    """A finding. `node` is None if nodes differ and no majority shows which one is wrong."""

    node: str | None
    text: str


class Peer(NamedTuple):
    """The address of a node during the connection test."""

    name: str
    address: str
    port: int


def check_machines(config: Config | None, bad_nodes: Path | None) -> bool:
    """Check this machine, or under torchrun all nodes. Returns False if there is a problem; see `run_preflight`."""
    under_torchrun = all(os.environ.get(name) for name in ("GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return run_preflight(config, bad_nodes) if under_torchrun else print_checks(run_checks(config))


def run_preflight(config: Config | None, bad_nodes: Path | None) -> bool:
    """Compare all nodes and print the result on rank 0. Called by all ranks under torchrun.

    Args:
        config: Its data, run directory and device are checked as well.
        bad_nodes: File to which the names of the nodes at fault are written, one per line.

    Returns:
        Whether there are no faults, equally on all ranks: torchrun on a node whose ranks had succeeded would wait ten
        minutes for the other nodes without reacting to signals.
    """
    launch = distributed.read_launch_variables()
    rank, world_size = launch.rank, launch.world_size
    node, node_count = int(os.environ["GROUP_RANK"]), world_size // launch.local_world_size
    store, _, _ = next(iter(dist.rendezvous("env://", rank, world_size)))
    with Watchdog(Path(tempfile.gettempdir()), rank) as watchdog:
        watchdog.expect("collecting the reports of all nodes", _TIMEOUT)
        exchange = NodeExchange(store, node, node_count, sends=launch.local_rank == 0)
        reports = _collect_reports(exchange, config)
        total = None
        if not find_faults(reports):
            watchdog.expect("joining the group and an all-reduce over all nodes", _TIMEOUT)
            with distributed.process_group(config.run.device if config else "auto") as rank_info:
                speeds, total = _measure_speeds(rank_info, node, node_count)
            reports = [report._replace(speeds=speeds[i]) for i, report in enumerate(reports)]
        # CPU cores are shared with other programs, so a short measurement on them does not reveal a bad node.
        faults = find_faults(reports, math.inf if reports[0].versions["GPUs"] == "none" else SLOW_FACTOR)
        if rank == 0:
            _print_reports(reports, faults, world_size, total)
            bad = sorted({fault.node for fault in faults if fault.node is not None})
            if bad_nodes and 0 < len(bad) < node_count:  # a fault of all nodes is not one of a node
                bad_nodes.write_text("".join(f"{name}\n" for name in bad))
            store.set("preflight/printed", "")
        # The first rank that exits with an error ends all others, so all wait until rank 0 has printed.
        store.wait(["preflight/printed"], timedelta(seconds=_TIMEOUT / 2))
    return not faults


def find_faults(reports: list[NodeReport], slow_factor: float = SLOW_FACTOR) -> list[Fault]:
    """Find what is wrong with which node; a node slower than the median by `slow_factor` is at fault."""
    faults = [Fault(report.name, text) for report in reports for text in report.problems]
    faults += _find_differences(reports)
    median_clock = statistics.median_low(report.clock for report in reports)
    for report in reports:
        if abs(report.clock - median_clock) > MAX_CLOCK_DIFFERENCE:
            faults.append(
                Fault(report.name, f"its clock differs from the others by {report.clock - median_clock:+.1f} s")
            )
    faults += _find_unreachable(reports)
    for key in sorted({key for report in reports for key in report.speeds}):
        median = statistics.median(report.speeds[key] for report in reports if key in report.speeds)
        for report in reports:
            if (speed := report.speeds.get(key, median)) < median / slow_factor:
                faults.append(Fault(report.name, f"{key}: {speed:.3g}, the median of the nodes is {median:.3g}"))
    return faults


def _find_differences(reports: list[NodeReport]) -> list[Fault]:
    """Find the versions in which nodes differ, one fault per node."""
    differences: dict[str | None, list[str]] = {}
    for key in sorted({key for report in reports for key in report.versions}):
        values = [report.versions.get(key, "absent") for report in reports]
        usual, count = Counter(values).most_common(1)[0]
        if 2 * count > len(reports):
            for report, value in zip(reports, values, strict=True):
                if value != usual:
                    text = f"{key} {value}, but {usual} on {count} of {len(reports)} nodes"
                    differences.setdefault(report.name, []).append(text)
        else:
            shown = ", ".join(f"{value} on {report.name}" for report, value in zip(reports, values, strict=True))
            differences.setdefault(None, []).append(f"{key} {shown}")
    faults = []
    for name, texts in differences.items():
        more = len(texts) - _SHOWN_DIFFERENCES
        faults.append(Fault(name, "; ".join(texts[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")))
    return faults


def _find_unreachable(reports: list[NodeReport]) -> list[Fault]:
    """Find failed connections. A node is at fault if more than half of the connections from it, or to it, failed."""
    failed = {report.name: [peer for peer, ok in report.connections.items() if not ok] for report in reports}
    tests_of = Counter(peer for report in reports for peer in report.connections)
    failures_of = Counter(peer for peers in failed.values() for peer in peers)
    isolated = {name for name, failures in failures_of.items() if 2 * failures > tests_of[name]}
    faults = []
    for report in reports:
        if peers := failed[report.name]:
            most = 2 * len(peers) > len(report.connections)
            at_fault = most or not isolated.intersection(peers)
            text = f"{len(peers)} nodes" if most and len(peers) > 1 else ", ".join(peers)
            faults.append(Fault(report.name if at_fault else None, f"{report.name} cannot connect to {text}"))
        if report.name in isolated:
            hint = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in slurm/env.sh choose the interface"
            faults.append(Fault(report.name, f"{failures_of[report.name]} nodes cannot connect to it; {hint}"))
    return faults


class NodeExchange:
    """Exchanges values between nodes through torchrun's store; the first rank of each node sends."""

    def __init__(self, store: dist.Store, node: int, node_count: int, sends: bool) -> None:
        self.store, self.node, self.node_count, self.sends = store, node, node_count, sends
        self.names = [f"number {i}" for i in range(node_count)]  # replaced once the names are known

    def gather(self, key: str, make_value: Callable[[], Any]) -> list[Any]:
        """Return the values of all nodes, on all ranks. Raises ValueError naming the nodes that sent none in time."""
        keys = [f"preflight/{key}/{i}" for i in range(self.node_count)]
        if self.sends:
            self.store.set(keys[self.node], json.dumps(make_value()))
        try:
            self.store.wait(keys, timedelta(seconds=_TIMEOUT / 2))
        except dist.DistStoreError as error:
            missing = [name for name, key in zip(self.names, keys, strict=True) if not self.store.check([key])]
            raise ValueError(
                f"preflight: {len(missing)} of {self.node_count} nodes have not sent their {key} within "
                f"{_TIMEOUT / 2:g} s: {', '.join(missing)}"
            ) from error
        return [json.loads(value) for value in self.store.multi_get(keys)]


def _collect_reports(exchange: NodeExchange, config: Config | None) -> list[NodeReport]:
    """Return the reports of all nodes, without speeds."""
    with closing(socket.create_server(("", 0), backlog=1024)) as server:
        port = server.getsockname()[1]
        peers = [Peer(*values) for values in exchange.gather("names", lambda: [node_name(), node_address(), port])]
        count = Counter(peer.name for peer in peers)
        peers = [p._replace(name=f"{p.name}#{i}") if count[p.name] > 1 else p for i, p in enumerate(peers)]
        exchange.names = [peer.name for peer in peers]
        clocks = exchange.gather("clocks", time.time)  # comparable, because all nodes have waited for the last name
        facts = exchange.gather("facts", lambda: [find_versions(), find_problems(config), free_memory()])
        connections = exchange.gather("connections", lambda: _connect(_choose_peers(exchange.node, peers)))
    return [
        NodeReport(peer.name, versions, problems, clock - clocks[0], memory, connected, {})
        for peer, clock, (versions, problems, memory), connected in zip(peers, clocks, facts, connections, strict=True)
    ]


def _choose_peers(node: int, peers: list[Peer]) -> list[Peer]:
    """Return the next node of the ring and a few random ones, so that the sockets grow linearly with the nodes."""
    following = (node + 1) % len(peers)
    others = [i for i in range(len(peers)) if i not in (node, following)]
    chosen = {following, *random.Random(node).sample(others, min(_RANDOM_PEERS, len(others)))} - {node}
    return [peers[i] for i in sorted(chosen)]


def _connect(peers: list[Peer]) -> dict[str, bool]:
    """Return whether a TCP connection to each peer succeeds, by name."""

    def connects(peer: Peer) -> bool:
        try:
            socket.create_connection((peer.address or peer.name, peer.port), timeout=_CONNECT_TIMEOUT).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(1 + _RANDOM_PEERS) as pool:
        return {peer.name: ok for peer, ok in zip(peers, pool.map(connects, peers), strict=True)}


class AllReduceSpeed(NamedTuple):
    """Bus bandwidth of an all-reduce over all ranks."""

    gb_per_second: float
    mib: int


def _measure_speeds(rank_info: RankInfo, node: int, node_count: int) -> tuple[list[dict[str, float]], AllReduceSpeed]:
    """Measure matrix products and all-reduces. Called by all ranks.

    Returns:
        The speeds of each node, which are those of its slowest rank, and the speed over all ranks.
    """
    cuda, local = rank_info.device.type == "cuda", rank_info.local_world_size
    size = 2**28 if cuda else 2**22
    data = torch.ones(size // 4, device=rank_info.device)

    def all_reduce(ranks: int, group: dist.ProcessGroup | None) -> float:
        """Return the bus bandwidth in GB/s, as nccl-tests define it."""
        seconds = _fastest(lambda: dist.all_reduce(data, dist.ReduceOp.MAX, group=group), rank_info.device)
        return 2 * (ranks - 1) / ranks * size / seconds / 1e9

    side = 8192 if cuda else 256
    a = torch.ones(side, side, device=rank_info.device, dtype=torch.bfloat16 if cuda else torch.float32)
    mine = {"matmul TFLOP/s": 2 * side**3 / _fastest(lambda: a @ a, rank_info.device) / 1e12}
    # Each node alone; then nodes (0, 1), (2, 3), … at the same time; then (1, 2), (3, 4), …. The faster of a node's two
    # neighbours counts, so that a slow node does not make its neighbours look slow. All ranks create all groups in the
    # same order: gloo hangs where ranks have created different numbers of them (torch 2.14).
    spans = [(i, i) for i in range(node_count) if local > 1]
    if node_count > 2:
        spans += [(i, i + 1) for first in (0, 1) for i in range(first, node_count - 1, 2)]
    groups = [(span, dist.new_group(list(range(span[0] * local, (span[1] + 1) * local)))) for span in spans]
    for (first, last), group in groups:
        if isinstance(group, dist.ProcessGroup):  # this rank is a member
            name = "all-reduce in the node GB/s" if first == last else "all-reduce with a neighbour GB/s"
            mine[name] = max(mine.get(name, 0.0), all_reduce(group.size(), group))
    over_all = all_reduce(rank_info.world_size, None) if rank_info.world_size > 1 else 0.0
    of_ranks: list[dict[str, float]] = [{}] * rank_info.world_size
    dist.all_gather_object(of_ranks, mine)
    of_nodes = [of_ranks[i * local : (i + 1) * local] for i in range(node_count)]
    slowest = [{key: min(rank[key] for rank in ranks) for key in ranks[0]} for ranks in of_nodes]
    return slowest, AllReduceSpeed(over_all, size // 2**20)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several repeats, after a warm-up."""
    fastest = float("inf")
    for repeat in range(_REPEATS + 1):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            fastest = min(fastest, time.perf_counter() - before)
    return fastest


def _print_reports(
    reports: list[NodeReport], faults: list[Fault], world_size: int, total: AllReduceSpeed | None
) -> None:
    console = Console(width=None if Console().is_terminal else 120, markup=False, highlight=False)
    usual = {
        key: Counter(report.versions.get(key, "absent") for report in reports).most_common(1)[0][0]
        for key in reports[0].versions
    }
    console.print(
        f"{len(reports)} nodes, {world_size} ranks; GPUs {usual['GPUs']}, driver {usual['driver']}, "
        f"torch {usual.get('package torch', torch.__version__)}, Python {usual['Python']}, code {usual['code']}"
    )
    speeds = sorted({key for report in reports for key in report.speeds})
    table = Table(box=None, pad_edge=False)
    for column in ("node", "clock s", "free GiB", *speeds):
        table.add_column(column, justify="left" if column == "node" else "right")
    for report in reports:
        cells = [f"{report.speeds[key]:.3g}" if key in report.speeds else "" for key in speeds]
        table.add_row(report.name, f"{report.clock:+.2f}", f"{report.memory:.0f}", *cells)
    console.print(table)
    if total is not None:
        console.print(f"all-reduce over all {world_size} ranks, {total.mib} MiB: {total.gb_per_second:.3g} GB/s")
    for fault in faults:
        console.print(f"{fault.node}: {fault.text}" if fault.node else fault.text, soft_wrap=True)
    bad = sorted({fault.node for fault in faults if fault.node})
    console.print(f"preflight: {', '.join(bad) or 'no node'} at fault" if faults else "preflight: all nodes are fit")
