"""The machines of a job, compared before it trains: which one lacks something, differs, is out of reach, or slow.

Under torchrun every node tells what it is over the store that torchrun has opened; nothing here hangs where the
network between nodes does, until each has reached each other by a plain connection. Then they compute and all-reduce.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import statistics
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from data.sources.open import find_files
from trainer import distributed
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.ops.doctor import compiler_problem
from trainer.ops.watchdog import Watchdog
from trainer.run.files import existing_parent

CLOCK_SECONDS = 5.0  # that clocks may differ
SLOW = 3.0  # times slower than the median node is a fault, not noise
_SHOWN = 5  # differences of a node
_WAIT = 180.0  # seconds for any step that needs all nodes
_CONNECT = 10.0  # seconds for a connection
_REPEATS = 5  # the best counts
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class NodeReport(NamedTuple):
    """What one machine says of itself. same: what must be equal everywhere. problems: what it lacks.

    clock: seconds ahead of the first node. memory: free, GiB. unreachable: nodes it cannot connect to. speeds: higher
    is better.
    """

    name: str
    same: dict[str, str]
    problems: list[str]
    clock: float
    memory: float
    unreachable: list[str]
    speeds: dict[str, float]


class Fault(NamedTuple):
    """node: whose it is; None where nodes differ and no majority says which is right."""

    node: str | None
    text: str


def find_faults(nodes: list[NodeReport], slow: float = SLOW) -> list[Fault]:
    """What is wrong with which node; one that is `slow` times slower than the median is."""
    faults = [Fault(node.name, text) for node in nodes for text in node.problems]
    faults += _differences(nodes)
    middle = statistics.median_low(node.clock for node in nodes)
    for node in nodes:
        if abs(node.clock - middle) > CLOCK_SECONDS:
            faults.append(Fault(node.name, f"its clock is {node.clock - middle:+.1f} s from the others'"))
    missed = Counter(name for node in nodes for name in node.unreachable)
    for node in nodes:
        if node.unreachable:
            blame = 2 * len(node.unreachable) >= len(nodes)
            whom = f"{len(node.unreachable)} nodes" if blame else ", ".join(node.unreachable)
            blamed = blame or not any(2 * missed[name] >= len(nodes) for name in node.unreachable)
            faults.append(Fault(node.name if blamed else None, f"{node.name} cannot connect to {whom}"))
        if 2 * missed[node.name] >= len(nodes):
            hint = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in slurm/env.sh choose the interface"
            faults.append(Fault(node.name, f"{missed[node.name]} nodes cannot connect to it; {hint}"))
    for key in sorted({key for node in nodes for key in node.speeds}):
        median = statistics.median(node.speeds[key] for node in nodes if key in node.speeds)
        for node in nodes:
            if (speed := node.speeds.get(key, median)) < median / slow:
                faults.append(Fault(node.name, f"{key}: {speed:.3g}, the median of the nodes is {median:.3g}"))
    return faults


def _differences(nodes: list[NodeReport]) -> list[Fault]:
    """What of `same` is not, one line a node."""
    unlike: dict[str | None, list[str]] = {}
    for key in sorted({key for node in nodes for key in node.same}):
        values = [node.same.get(key, "absent") for node in nodes]
        usual, count = Counter(values).most_common(1)[0]
        if 2 * count > len(nodes):
            for node, value in zip(nodes, values, strict=True):
                if value != usual:
                    unlike.setdefault(node.name, []).append(
                        f"{key} {value}, but {usual} on {count} of {len(nodes)} nodes"
                    )
        else:
            shown = ", ".join(f"{value} on {node.name}" for node, value in zip(nodes, values, strict=True))
            unlike.setdefault(None, []).append(f"{key} {shown}")
    more = {name: f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "" for name, texts in unlike.items()}
    return [Fault(name, "; ".join(texts[:_SHOWN]) + more[name]) for name, texts in unlike.items()]


def run_preflight(config: Config | None, bad_nodes: Path | None) -> bool:
    """Run by all ranks under torchrun; prints on the first. False on all of them if anything is wrong.

    On all, since the torchrun of a node whose ranks were content waits ten minutes for the others, deaf to signals. The
    names of the nodes at fault, one a line, go to `bad_nodes`.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    index, local_rank = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])
    count = world_size // int(os.environ["LOCAL_WORLD_SIZE"])
    store, _, _ = next(iter(dist.rendezvous("env://", rank, world_size)))
    with Watchdog(Path(tempfile.gettempdir()), rank) as watchdog:
        watchdog.expect("hearing from every node", _WAIT)
        exchange = _Exchange(store, index, count, local_rank == 0)
        nodes = _introduce(exchange, config)
        over_all = None
        if not find_faults(nodes):  # else the group might hang
            watchdog.expect("joining the group and an all-reduce over all nodes", _WAIT)
            with distributed.process_group(config.run.device if config else "auto") as rank_info:
                speeds, over_all = _speeds(rank_info, index, count)
            nodes = [node._replace(speeds=speeds[i]) for i, node in enumerate(nodes)]
        # Cores are shared with other programs, so what they do in a second says little.
        faults = find_faults(nodes, math.inf if nodes[0].same["GPUs"] == "none" else SLOW)
        if rank == 0:
            _show(nodes, faults, world_size, over_all)
            bad = sorted({fault.node for fault in faults if fault.node is not None})
            if bad_nodes and 0 < len(bad) < count:  # what all have is not a node's fault
                bad_nodes.write_text("".join(f"{name}\n" for name in bad))
            store.set("doctor/told", "")
        store.wait(["doctor/told"], timedelta(seconds=_WAIT / 2))  # the first to exit with 1 ends the others
    return not faults


class _Exchange:
    """What each node says, by its first rank, to all ranks, over the store alone."""

    def __init__(self, store: dist.Store, index: int, count: int, speaks: bool) -> None:
        self.store, self.index, self.count, self.speaks = store, index, count, speaks
        self.names = [f"number {i}" for i in range(count)]  # until they have told them

    def all(self, name: str, say: Callable[[], Any]) -> list[Any]:
        """The answers of all nodes. Raises ValueError that tells which are missing after the time is up."""
        keys = [f"doctor/{name}/{i}" for i in range(self.count)]
        if self.speaks:
            self.store.set(keys[self.index], json.dumps(say()))
        try:
            self.store.wait(keys, timedelta(seconds=_WAIT / 2))
        except dist.DistStoreError as error:
            missing = [who for who, key in zip(self.names, keys, strict=True) if not self.store.check([key])]
            seconds = f"in {_WAIT / 2:g} s"
            raise ValueError(
                f"of {self.count} nodes these have not told their {name} {seconds}: {', '.join(missing)}"
            ) from error
        return [json.loads(value) for value in self.store.multi_get(keys)]


def _introduce(exchange: _Exchange, config: Config | None) -> list[NodeReport]:
    """All nodes, without speeds."""
    with closing(socket.create_server(("", 0), backlog=1024)) as server:
        names: list[tuple[str, str, int]] = exchange.all(
            "name", lambda: [_name(), *_address(), server.getsockname()[1]]
        )
        taken = Counter(name for name, _, _ in names)
        names = [(f"{n}#{i}" if taken[n] > 1 else n, address, port) for i, (n, address, port) in enumerate(names)]
        exchange.names = [n for n, _, _ in names]
        clocks = exchange.all("clock", time.time)  # all were waiting for the last name
        facts = exchange.all("facts", lambda: [_same(), _problems(config), _free_memory()])
        reach = exchange.all("connections", lambda: _unreachable(names))
    return [
        NodeReport(name[0], same, problems, clock - clocks[0], memory, unreachable, {})
        for name, clock, (same, problems, memory), unreachable in zip(names, clocks, facts, reach, strict=True)
    ]


def _name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _address() -> tuple[str]:
    """IPv4 address that other nodes are told: that of GLOO_SOCKET_IFNAME, or of the host's name, as gloo does."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    try:
        if not interface:
            return (socket.gethostbyname(socket.gethostname()),)
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return (socket.inet_ntoa(answer[20:24]),)
    except OSError:
        return ("",)


def _unreachable(names: list[tuple[str, str, int]]) -> list[str]:
    def fails(there: tuple[str, str, int]) -> bool:
        try:
            socket.create_connection((there[1] or there[0], there[2]), timeout=_CONNECT).close()
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(32) as pool:
        return [name for (name, _, _), failed in zip(names, pool.map(fails, names), strict=True) if failed]


def _same() -> dict[str, str]:
    """What must be equal on all nodes, by name."""
    packages: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        packages.setdefault(f"package {found.metadata['Name']}", found.version)  # the first on the path is imported
    code = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder in ("trainer", "models", "data", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            code.update(path.read_bytes())
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        **packages,
        "code": code.hexdigest()[:12],
        "Python": platform.python_version(),
        "GPUs": ", ".join(f"{n} x {name}" for name, n in gpus.items()) or "none",
        "driver": _driver(),
        "ranks": os.environ["LOCAL_WORLD_SIZE"],
    }


def _driver() -> str:
    try:
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "none"
    return found.group() if found else "unknown"


def _free_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def _problems(config: Config | None) -> list[str]:
    """What this node lacks. Looks at the data from the door: listing millions of files is left to the training."""
    problems = []
    ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    device = config.run.device if config else "auto"
    expected = gpus or int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)  # none seen: a container without --nv
    if gpus < ranks and (device == "cuda" or (device == "auto" and expected)):
        problems.append(f"sees {gpus} GPUs for {ranks} ranks")
    for i in range(min(gpus, ranks)):
        free, total = torch.cuda.mem_get_info(i)
        if free < 0.85 * total:
            problems.append(f"GPU {i}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process is on it")
    if gpus and (problem := compiler_problem()):
        problems.append(problem)
    if (shared := shutil.disk_usage("/dev/shm").total / 2**30) < 1:
        problems.append(f"/dev/shm has {shared:.2f} GiB, through which batches go: docker run --ipc=host")
    if config is None:
        return problems
    for key, given in (("data.train", config.data.train), ("data.val", config.data.val)):
        try:
            if given is not None:
                _touch(Path(given))
        except (ValueError, OSError) as error:
            problems.append(f"{key}: {error}")
    folder = existing_parent(Path(config.run.dir))
    if (free_gib := shutil.disk_usage(folder).free / 2**30) < 1 or not os.access(folder, os.W_OK):
        problems.append(f"run.dir: {free_gib:.1f} GiB free at {folder}, writable: {os.access(folder, os.W_OK)}")
    return problems


def _touch(path: Path) -> None:
    """Read one byte, or list one name, of what data.train or data.val names. Raises ValueError or OSError."""
    files = find_files(path)
    if files:
        with files[0].open("rb") as file:
            file.read(1)
    elif next(os.scandir(path), None) is None:
        raise ValueError(f"{path} is empty")


def _speeds(rank_info: RankInfo, index: int, count: int) -> tuple[list[dict[str, float]], tuple[float, int]]:
    """Of each node the speed of its slowest rank, and GB/s and MiB of the all-reduce over all ranks."""
    cuda = rank_info.device.type == "cuda"
    size = 2**28 if cuda else 2**22
    data = torch.ones(size // 4, device=rank_info.device)

    def all_reduce(members: int, group: dist.ProcessGroup | None) -> float:
        """Bus bandwidth in GB/s, as nccl-tests define it."""
        seconds = _best(lambda: dist.all_reduce(data, dist.ReduceOp.MAX, group=group), rank_info.device)
        return 2 * (members - 1) / members * size / seconds / 1e9

    side = 8192 if cuda else 256
    a = torch.ones(side, side, device=rank_info.device, dtype=torch.bfloat16 if cuda else torch.float32)
    mine = {"matmul TFLOP/s": 2 * side**3 / _best(lambda: a @ a, rank_info.device) / 1e12}
    # Each node, then nodes 0 and 1, 2 and 3, … at a time, then 1 and 2, 3 and 4, …; the better neighbour counts. All
    # ranks make all groups: torch numbers them. One that is not in a group goes on at once.
    spans = [(i, i) for i in range(count) if rank_info.local_world_size > 1]
    if count > 2:
        spans += [(i, i + 1) for first in (0, 1) for i in range(first, count - 1, 2)]
    groups = []
    for first, last in spans:
        ranks = list(range(first * rank_info.local_world_size, (last + 1) * rank_info.local_world_size))
        group = dist.new_group(ranks)
        if isinstance(group, dist.ProcessGroup):
            groups.append((first, last, len(ranks), group))
    for first, last, members, group in groups:
        name = "all-reduce in the node GB/s" if first == last else "all-reduce with a neighbour GB/s"
        mine[name] = max(mine.get(name, 0.0), all_reduce(members, group))
    over_all = all_reduce(rank_info.world_size, None) if rank_info.world_size > 1 else 0.0
    every: list[dict[str, float]] = [{}] * rank_info.world_size
    dist.all_gather_object(every, mine)
    of_node = [every[i * rank_info.local_world_size : (i + 1) * rank_info.local_world_size] for i in range(count)]
    slowest = [{key: min(rank[key] for rank in ranks) for key in ranks[0]} for ranks in of_node]
    return slowest, (over_all, size // 2**20)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some repeats, after one that does not count."""
    best = float("inf")
    for repeat in range(_REPEATS + 1):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - before)
    return best


def _show(nodes: list[NodeReport], faults: list[Fault], world_size: int, over_all: tuple[float, int] | None) -> None:
    console = Console(width=None if Console().is_terminal else 120, markup=False, highlight=False)
    usual = {key: Counter(node.same.get(key, "absent") for node in nodes).most_common(1)[0][0] for key in nodes[0].same}
    console.print(
        f"{len(nodes)} nodes, {world_size} ranks; GPUs {usual['GPUs']}, driver {usual['driver']}, "
        f"torch {usual.get('package torch', torch.__version__)}, Python {usual['Python']}, code {usual['code']}"
    )
    speeds = sorted({key for node in nodes for key in node.speeds})
    table = Table(box=None, pad_edge=False)
    for column in ("node", "clock s", "free GiB", *speeds):
        table.add_column(column, justify="left" if column == "node" else "right")
    for node in nodes:
        figures = [f"{node.speeds[key]:.3g}" if key in node.speeds else "" for key in speeds]
        table.add_row(node.name, f"{node.clock:+.2f}", f"{node.memory:.0f}", *figures)
    console.print(table)
    if over_all is not None:
        console.print(f"all-reduce over all {world_size} ranks, {over_all[1]} MiB: {over_all[0]:.3g} GB/s")
    for fault in faults:
        console.print(f"{fault.node}: {fault.text}" if fault.node else fault.text, soft_wrap=True)
    bad = sorted({fault.node for fault in faults if fault.node})
    console.print(f"preflight: {', '.join(bad) or 'no node'} at fault" if faults else "preflight: all nodes are fit")
