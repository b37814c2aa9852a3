"""GPUs and networks, and the time of a collective on them: NCCL's own alpha-beta model, with NCCL's own constants.

docs/plan.md has the table of all constants with their sources.
"""

import math
from typing import NamedTuple

from trainer.plan.collectives import Collective
from trainer.plan.roofline import A100, H100
from trainer.plan.roofline import Gpu as Peaks


class Gpu(NamedTuple):
    """fp32: FLOP/s without tensor cores. memory: bytes. nvlink: bytes/s that NCCL's rings get within a node."""

    peaks: Peaks
    fp32: float
    memory: int
    nvlink: float


# What torch.cuda.mem_get_info calls total on GPUs that are sold as these, rounded down.
SIZES = {"40 GB": 39 * 2**30, "80 GB": 79 * 2**30, "141 GB": 139 * 2**30}
# NVIDIA's datasheets. nvlink: NCCL's src/graph/topo.h, a link times the links: 6 x 20, 12 x 20 (of which
# src/graph/tuning.cc uses 235), 18 x 20.6 GB/s.
GPUS = {
    "v100": Gpu(
        Peaks("V100 32 GB", {"float16": 125e12}, 900e9, 16 * 80 * 1.53e9),
        fp32=15.7e12,
        memory=31 * 2**30,
        nvlink=120e9,
    ),
    "a100-40": Gpu(
        Peaks("A100 40 GB", A100.flops, 1555e9, A100.exponentials), fp32=19.5e12, memory=SIZES["40 GB"], nvlink=235e9
    ),
    "a100": Gpu(A100, fp32=19.5e12, memory=SIZES["80 GB"], nvlink=235e9),
    "h100": Gpu(H100, fp32=67e12, memory=SIZES["80 GB"], nvlink=370.8e9),
    "h200": Gpu(
        Peaks("H200", H100.flops, 4800e9, H100.exponentials), fp32=67e12, memory=SIZES["141 GB"], nvlink=370.8e9
    ),
}
# Nothing is known of it: only ratios of work count, and `--calibrate` makes times of them.
CPU = Gpu(Peaks("CPU", {}, 20e9, 1e9), fp32=100e9, memory=2**62, nvlink=5e9)


class Net(NamedTuple):
    """Between nodes. gbits: Gb/s of a link. links: of a node; None: one for each GPU."""

    gbits: float
    links: int | None = None


NETS = {
    "ib-hdr": Net(200),  # DGX A100
    "ib-ndr": Net(400),  # DGX H100
    "ib-edr": Net(100, 4),  # DGX-1
    "efa": Net(100, 4),  # AWS p4d
    "ethernet-100": Net(100, 1),
    "ethernet-25": Net(25, 1),
    "ethernet-10": Net(10, 1),
}
NET_ATTAINED = 0.9  # github.com/NVIDIA/nccl-tests issues 100, 119 and 175: 86 to 96 of 100 GB/s


class Cluster(NamedTuple):
    """per_node: GPUs of a node. net: bytes/s in and out of a node, as attained."""

    gpu: Gpu
    per_node: int
    net: float


def make_cluster(gpu: str, per_node: int, net: str) -> Cluster:
    """gpu: of GPUS, or cpu. net: of NETS, or Gb/s of a node as a number. Raises ValueError for what is neither."""
    if gpu != "cpu" and gpu not in GPUS:
        raise ValueError(f"plan: got --gpu {gpu}, need one of {', '.join(GPUS)}")
    try:
        link = NETS[net] if net in NETS else Net(float(net), 1)
    except ValueError:
        raise ValueError(f"plan: got --net {net}, need one of {', '.join(NETS)}, or Gb/s of a node") from None
    if not 0 < link.gbits < math.inf:
        raise ValueError(f"plan: got --net {net}, need more than 0 Gb/s")
    links = link.links or per_node
    return Cluster(CPU if gpu == "cpu" else GPUS[gpu], per_node, NET_ATTAINED * links * link.gbits / 8 * 1e9)


class Protocol(NamedTuple):
    """Microseconds: once, a hop over NVLink, a hop over the network. share: of the bandwidth."""

    once: float
    nvlink: float
    net: float
    share: float


# LL, LL128, Simple: github.com/NVIDIA/nccl, src/graph/tuning.cc of NCCL 2.11 (baseLat, hwLat and below).
RING = (Protocol(3.6, 0.47, 2.7, 1 / 4), Protocol(10.0, 1.9, 4.0, 0.92), Protocol(8.4, 3.4, 9.6, 1.0))
TREE = (Protocol(4.4, 0.52, 5.0, 0.9 / 3.8), Protocol(4.4, 1.2, 8.5, 0.9 * 0.915), Protocol(0.0, 28, 50, 0.9))
PEERS = 8  # of an all-to-all, which are sent to at once; ours, NCCL's model has no all-to-all


def seconds(collective: Collective, nodes: int, cluster: Cluster) -> float:
    """Of a collective of a group that is spread evenly over so many nodes: alpha times hops plus bytes over beta.

    The fastest of NCCL's protocols, and of ring and tree where there is a choice. All groups of the kind run at once
    and share the network: one GPU of each node has its part of it.
    """
    ranks = collective.ranks
    if ranks == 1:
        return 0.0
    here = ranks / nodes
    rate = cluster.gpu.nvlink if nodes == 1 else min(cluster.gpu.nvlink, cluster.net * here / cluster.per_node)
    if collective.operator == "all_to_all":
        outside = collective.sent * (ranks - here) / (ranks - 1)
        inside = (collective.sent - outside) / cluster.gpu.nvlink
        hop = RING[0].net if nodes > 1 else RING[0].nvlink
        alpha = RING[0].once + math.ceil((ranks - 1) / PEERS) * hop
        return 1e-6 * alpha + max(inside, outside * cluster.per_node / cluster.net)
    rounds = 2 if collective.operator == "all_reduce" else 1
    hops, far = rounds * (ranks - 1), rounds * (nodes - 1)
    times = [1e-6 * (p.once + (hops - far) * p.nvlink + far * p.net) + collective.sent / rate / p.share for p in RING]
    if collective.operator == "all_reduce":
        sent = collective.sent * ranks / (ranks - 1)
        tree = [p.once + 2 * ((here - 1) * p.nvlink + math.log2(nodes) * p.net) for p in TREE]
        times += [1e-6 * alpha + sent / rate / p.share for alpha, p in zip(tree, TREE, strict=True)]
    return min(times)
