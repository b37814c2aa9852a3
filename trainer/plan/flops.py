"""Counts the FLOPs of a training step."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import build_encoder
from trainer.config import Config


def step_flops(config: Config) -> float:
    """Return the FLOPs of one step of the global batch that the method needs: recomputation is not counted.

    It sums the student's forward and backward (twice the forward), the teacher's forward, and the products of queries
    and negatives.
    """
    with torch.device("meta"):
        encoder = build_encoder(config)
    encoder.eval()  # in training mode BatchNorm needs more than one image
    sizes = [view.size for view in config.data.views]
    forward = {size: _forward_flops(encoder, size) for size in set(sizes)}
    keys, queries = config.method.key_views, config.method.query_views(len(sizes))
    teacher = sum(forward[sizes[j]] for j in keys) if config.method.has_teacher else 0
    networks = teacher + 3 * sum(forward[sizes[i]] for i in queries)
    rows = sum(i != j for j in keys for i in queries)
    return config.data.batch_size * (networks + rows * config.method.negatives_flops(config.bank, config.model.dim))


def _forward_flops(network: nn.Module, size: int) -> int:
    """Return the FLOPs of the forward pass of one image of size x size pixels."""
    with FlopCounterMode(display=False) as counter:
        network([torch.empty(1, 3, size, size, device="meta")])
    return counter.get_total_flops()
