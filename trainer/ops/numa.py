"""Binds a rank to the cores of the NUMA node to which its GPU is connected, so that it launches kernels from near by.

Memory follows, because Linux takes it from the node whose core touches it first. torchrun's --numa-binding does this
with numactl, but ends the job where numactl is not installed or where the job has no core of a node.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.processes import CORES_VARIABLE

log = logging.getLogger(__name__)

_SYSFS = Path("/sys")


def bind(local_rank: int, ranks: int) -> None:
    """Bind this process, and those that it starts, to the cores next to its GPU if each rank keeps its share of cores.

    Args:
        local_rank: This rank on this machine, and the number of its GPU.
        ranks: Number of ranks on this machine.
    """
    if torch.cuda.device_count() < ranks:
        return  # a rank that has no GPU reports it
    nodes = [_node_of_gpu(i) for i in range(ranks)]
    allowed = os.sched_getaffinity(0)
    cores = choose(local_rank, nodes, allowed)
    if cores is not None:
        os.environ[CORES_VARIABLE] = str(len(allowed))
        os.sched_setaffinity(0, cores)
        log.info("rank %d of this machine runs on %d cores of NUMA node %s", local_rank, len(cores), nodes[local_rank])


def choose(local_rank: int, nodes: Sequence[int | None], allowed: set[int]) -> set[int] | None:
    """Return the cores for a rank, or None if it had better not be bound.

    A rank that is alone on a machine of two NUMA nodes needs all cores for its data workers. So do ranks whose GPUs are
    all connected to one of them.

    Args:
        local_rank: This rank on this machine.
        nodes: NUMA node of each rank's GPU; None if it is unknown.
        allowed: Cores that this process may use.
    """
    node = nodes[local_rank]
    if node is None:
        return None
    cores = _cores_of_node(node) & allowed
    share = len(allowed) / len(nodes)
    return cores if cores != allowed and len(cores) >= share * nodes.count(node) else None


def _node_of_gpu(number: int) -> int | None:
    gpu: Any = torch.cuda.get_device_properties(number)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((_SYSFS / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):  # a virtual machine or a container may hide it
        return None
    return node if node >= 0 else None  # -1: the machine has one node only


def _cores_of_node(node: int) -> set[int]:
    """Return the cores of a NUMA node, which Linux lists as 0-15,64-79."""
    try:
        text = (_SYSFS / f"devices/system/node/node{node}/cpulist").read_text().strip()
    except OSError:
        return set()
    spans = [span.partition("-") for span in text.split(",") if span]
    return {core for first, _, last in spans for core in range(int(first), int(last or first) + 1)}
