"""What a training step has to compute, and what a GPU can."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.build import build_encoder
from trainer.config import Config


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
    return config.data.batch_size * (networks + rows * config.method.negatives_flops(config.bank, config.model.dim))


def _forward(network: nn.Module, size: int) -> int:
    """Of one image of `size` pixels."""
    with FlopCounterMode(display=False) as counter:
        network([torch.empty(1, 3, size, size, device="meta")])
    return counter.get_total_flops()
