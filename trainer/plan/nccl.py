"""The time of a collective: NCCL's own alpha-beta model with NCCL's own constants.

The time is latency (alpha) times the number of hops, plus bytes over bandwidth (beta). Source of the model and of the
constants: github.com/NVIDIA/nccl, src/graph/tuning.cc of NCCL 2.11 (baseLat, hwLat and below).
"""

import math
from typing import NamedTuple

from trainer.plan.collectives import Collective
from trainer.plan.hardware import Cluster


class Protocol(NamedTuple):
    """Microseconds per collective, per hop over NVLink and per hop over the network; share of the bandwidth."""

    base: float
    nvlink_hop: float
    network_hop: float
    bandwidth: float


# LL, LL128, Simple.
RING = (Protocol(3.6, 0.47, 2.7, 1 / 4), Protocol(10.0, 1.9, 4.0, 0.92), Protocol(8.4, 3.4, 9.6, 1.0))
TREE = (Protocol(4.4, 0.52, 5.0, 0.9 / 3.8), Protocol(4.4, 1.2, 8.5, 0.9 * 0.915), Protocol(0.0, 28, 50, 0.9))
ALL_TO_ALL_PEERS = 8  # peers that a rank sends to at once; our assumption, as NCCL's model has no all-to-all


def collective_seconds(collective: Collective, nodes: int, cluster: Cluster) -> float:
    """Predict the time of a collective.

    The fastest of NCCL's protocols is taken, and for all-reduce the faster of ring and tree. All groups of the kind run
    at the same time and share the network, so a group's share of it is that of its GPUs in a node.

    Args:
        collective: The call, with the size of its group.
        nodes: Number of nodes that the group is spread over evenly.
        cluster: The hardware.
    """
    ranks = collective.ranks
    if ranks == 1:
        return 0.0
    gpu, per_node = cluster.gpu, ranks / nodes
    if collective.operator == "all_to_all":
        outside = collective.sent * (ranks - per_node) / (ranks - 1)
        inside = (collective.sent - outside) / gpu.nvlink
        hop = RING[0].network_hop if nodes > 1 else RING[0].nvlink_hop
        alpha = RING[0].base + math.ceil((ranks - 1) / ALL_TO_ALL_PEERS) * hop
        return 1e-6 * alpha + max(inside, outside * cluster.gpus_per_node / cluster.network)
    rate = gpu.nvlink if nodes == 1 else min(gpu.nvlink, cluster.network * per_node / cluster.gpus_per_node)
    rounds = 2 if collective.operator == "all_reduce" else 1
    hops, network_hops = rounds * (ranks - 1), rounds * (nodes - 1)
    times = [
        1e-6 * (p.base + (hops - network_hops) * p.nvlink_hop + network_hops * p.network_hop)
        + collective.sent / rate / p.bandwidth
        for p in RING
    ]
    if collective.operator == "all_reduce":
        sent = collective.sent * ranks / (ranks - 1)
        times += [
            1e-6 * (p.base + 2 * ((per_node - 1) * p.nvlink_hop + math.log2(nodes) * p.network_hop))
            + sent / rate / p.bandwidth
            for p in TREE
        ]
    return min(times)
