"""What a training step has to compute, and what a GPU can."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import build_encoder
from trainer.config import Config

# Dense bf16 or fp16 products in FLOP/s, from NVIDIA's datasheets, by what is in the device's name; the first that fits.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 150e12,
    "L4": 121e12,
    "V100": 125e12,
}


def peak(device: torch.device) -> float | None:
    """FLOP/s of bf16 products that a GPU is sold for; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def step_flops(config: Config) -> float:
    """FLOPs of one step of the whole batch, as the method asks for them: what is computed twice counts once.

    Forward and backward (twice the forward) of the student, forward of the teacher, and three products of queries
    and negatives: similarities, the queries' gradient and, of learned ones, the negatives'.
    """
    with torch.device("meta"):
        encoder = build_encoder(config)
    encoder.eval()  # BatchNorm would want more than one image
    forward = {size: _forward(encoder, size) for size in {view.size for view in config.data.views}}
    sizes = [view.size for view in config.data.views]
    keys, queries = config.method.key_views, config.method.query_views(len(sizes))
    networks = sum(forward[sizes[j]] for j in keys) + 3 * sum(forward[sizes[i]] for i in queries)
    rows = sum(i != j for j in keys for i in queries)
    products = {"bank": 3, "queue": 2, "none": 0}[config.method.negatives]
    return config.data.batch_size * (networks + products * 2.0 * rows * config.bank.size * config.model.dim)


def _forward(network: nn.Module, size: int) -> int:
    """Of one image of `size` pixels."""
    with FlopCounterMode(display=False) as counter:
        network([torch.empty(1, 3, size, size, device="meta")])
    return counter.get_total_flops()
