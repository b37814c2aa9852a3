"""GPUs, networks and clusters: the one table of their constants. docs/plan.md lists the sources."""

import math
import re
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Peak rates and memory of a GPU.

    Attributes:
        name: The model, which is a word of the name that CUDA reports, and the variant.
        flops: Dense matrix products on tensor cores, in FLOP/s by input type ("bfloat16", "float16" or "tf32").
        fp32_flops: FLOP/s without tensor cores.
        exponentials: Exponentials per second on the special function units.
        bandwidth: Memory bandwidth in bytes/s.
        memory: Bytes that `torch.cuda.mem_get_info` reports as the total, rounded down.
        nvlink: Bytes/s that one GPU reaches in NCCL's rings within a node.
    """

    name: str
    flops: dict[str, float]
    fp32_flops: float
    exponentials: float
    bandwidth: float
    memory: int
    nvlink: float

    @property
    def model(self) -> str:
        """The name without the variant, such as A100."""
        return self.name.split()[0]


MEMORY_SIZES = {"40 GB": 39 * 2**30, "80 GB": 79 * 2**30, "141 GB": 139 * 2**30}  # as sold, and as CUDA reports them
_A100_FLOPS = {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12}
_H100_FLOPS = {"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12}
# Special function units produce 16 results per clock and multiprocessor (V100, A100, H100: CUDA C++ Programming Guide,
# "Throughput of Native Arithmetic Instructions"). Multiprocessors and the clock of the rated FLOP/s are from NVIDIA's
# whitepapers. The other rates are from NVIDIA's datasheets.
_V100_EXPONENTIALS, _A100_EXPONENTIALS, _H100_EXPONENTIALS = 16 * 80 * 1.53e9, 16 * 108 * 1.41e9, 16 * 132 * 1.83e9
# A link's rate times the number of links, from NCCL's src/graph/topo.h: 6 x 20, 12 x 20 and 18 x 20.6 GB/s. For the
# A100, NCCL's src/graph/tuning.cc uses 235.
_V100_NVLINK, _A100_NVLINK, _H100_NVLINK = 120e9, 235e9, 370.8e9
GPUS = {
    "v100": Gpu(
        "V100 32 GB", {"float16": 125e12}, 15.7e12, _V100_EXPONENTIALS, 900e9, memory=31 * 2**30, nvlink=_V100_NVLINK
    ),
    "a100-40": Gpu(
        "A100 40 GB", _A100_FLOPS, 19.5e12, _A100_EXPONENTIALS, 1555e9, MEMORY_SIZES["40 GB"], nvlink=_A100_NVLINK
    ),
    "a100": Gpu(
        "A100 80 GB", _A100_FLOPS, 19.5e12, _A100_EXPONENTIALS, 2039e9, MEMORY_SIZES["80 GB"], nvlink=_A100_NVLINK
    ),
    "h100": Gpu("H100 SXM", _H100_FLOPS, 67e12, _H100_EXPONENTIALS, 3350e9, MEMORY_SIZES["80 GB"], nvlink=_H100_NVLINK),
    "h200": Gpu("H200", _H100_FLOPS, 67e12, _H100_EXPONENTIALS, 4800e9, MEMORY_SIZES["141 GB"], nvlink=_H100_NVLINK),
}
# Placeholder rates: the planner uses only ratios of them, which `--calibrate` turns into times.
CPU = Gpu("CPU", {}, fp32_flops=100e9, exponentials=1e9, bandwidth=20e9, memory=2**62, nvlink=5e9)
# GPUs of which only the FLOP/s of bf16 products are needed, by words of the name that CUDA reports (datasheets).
_OTHER_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "L40S": 362e12,
    "A30": 165e12,
    "A40": 150e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the GPU's rated FLOP/s of products in its fastest 16-bit type, or None if they are not known."""
    name = _cuda_name(device)
    peaks = {**_OTHER_PEAKS, **{gpu.model: max(gpu.flops.values()) for gpu in GPUS.values()}}
    return next((flops for words, flops in peaks.items() if _has(name, words)), None)


def known_gpu(device: torch.device) -> Gpu | None:
    """Return the constants of the GPU, of its models that whose memory is nearest; None if it is not in the table.

    PCIe and NVL cards are not: their clocks, bandwidths and links differ from those of the modules in the table.
    """
    name = _cuda_name(device)
    if _has(name, "PCIe") or _has(name, "NVL"):
        return None
    models = [gpu for gpu in GPUS.values() if _has(name, gpu.model)]
    memory = torch.cuda.get_device_properties(device).total_memory if models else 0
    return min(models, key=lambda gpu: abs(gpu.memory - memory), default=None)


def _cuda_name(device: torch.device) -> str:
    """Return the name that CUDA reports; "" for a CPU and for a part of a GPU (MIG), whose rates are not the GPU's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return "" if _has(name, "MIG") else name


def _has(name: str, words: str) -> bool:
    """Return whether a GPU's name has these words. "NVIDIA L40" does not have L4, nor "NVIDIA RTX A4000" A40."""
    return bool(re.search(rf"\b{words}\b", name, re.IGNORECASE))


class Network(NamedTuple):
    """The network between nodes: Gb/s of one link, and links of a node (None: one for each GPU)."""

    gbits: float
    links: int | None = None


NETWORKS = {
    "ib-hdr": Network(200),  # DGX A100
    "ib-ndr": Network(400),  # DGX H100
    "ib-edr": Network(100, 4),  # DGX-1
    "efa": Network(100, 4),  # AWS p4d
    "ethernet-100": Network(100, 1),
    "ethernet-25": Network(25, 1),
    "ethernet-10": Network(10, 1),
}
NETWORK_EFFICIENCY = 0.9  # github.com/NVIDIA/nccl-tests issues 100, 119 and 175: 86 to 96 of 100 GB/s


class Cluster(NamedTuple):
    """Equal nodes; `network` is the bytes/s that a node reaches in each direction."""

    gpu: Gpu
    gpus_per_node: int
    network: float


def make_cluster(gpu: str, gpus_per_node: int, net: str) -> Cluster:
    """Look up the constants of a GPU (a key of GPUS, or "cpu") and of a network (a key of NETWORKS, or a node's Gb/s).

    Raises:
        ValueError: A name is unknown, or the rate is not positive.
    """
    if gpu != "cpu" and gpu not in GPUS:
        raise ValueError(f"plan: got --gpu {gpu}, need one of {', '.join(GPUS)}")
    try:
        network = NETWORKS[net] if net in NETWORKS else Network(float(net), 1)
    except ValueError:
        raise ValueError(f"plan: got --net {net}, need one of {', '.join(NETWORKS)}, or Gb/s of a node") from None
    if not 0 < network.gbits < math.inf:
        raise ValueError(f"plan: got --net {net}, need more than 0 Gb/s")
    links = network.links or gpus_per_node
    rate = NETWORK_EFFICIENCY * links * network.gbits / 8 * 1e9
    return Cluster(CPU if gpu == "cpu" else GPUS[gpu], gpus_per_node, rate)
