"""Features of a data set from a frozen network."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data.batch import Crops
from data.loader import eval_batches
from data.sources.open import Source
from models.encoder import Encoder
from trainer.build import autocast_dtype
from trainer.config import Config
from trainer.distributed import raise_on_all_ranks

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Unit rows and labels on the device, and the samples they are of."""

    x_ND: Tensor
    labels_N: Tensor
    samples_N: Tensor


@torch.no_grad()
def apply(
    network: nn.Module,
    function: Callable[[Tensor], Tensor],
    source: Source,
    samples: NDArray[np.int64],
    device: torch.device,
    config: Config,
    crops: Crops | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`function` of the central views of `samples` (int64 [N]), or random ones, in fp32, and the samples they are of.

    network: in evaluation mode meanwhile. Images that cannot be read are left out; at the end the log says how many.
    """
    size = config.eval.size or config.data.views[0].size
    precision = autocast_dtype(config, device)
    bad: list[tuple[int, str]] = []
    batches = eval_batches(source, samples, size, config.eval.batch_size, config.data.workers_for(device), crops)
    for batch in batches:
        bad += batch.unreadable
        if len(batch.samples):
            with frozen(network), torch.autocast(device.type, precision, enabled=precision != torch.float32):
                x = function(*batch.normalized(device))
            yield x.float(), batch.samples
    if bad:
        log.warning("%d of %d images cannot be read and are left out, such as %s", len(bad), len(samples), bad[0][1])


def embed(
    encoder: Encoder,
    source: Source,
    samples: NDArray[np.int64],
    device: torch.device,
    config: Config,
    *,
    head: bool = False,
) -> Features:
    """Of `samples` (int64 [N]), in evaluation mode: the backbone's features, or the head's embeddings.

    Called by all ranks. Raises ValueError, on all of them, if one can read none of its samples.
    """
    xs, shown = [], []
    function = (lambda x_BCHW: encoder([x_BCHW])) if head else encoder.backbone
    for x_BD, numbers in apply(encoder, function, source, samples, device, config):
        xs.append(F.normalize(x_BD, dim=1))
        shown.append(numbers)
    raise_on_all_ranks(
        None if xs else f"none of {len(samples)} images can be read, such as {source.name(int(samples[0]))}"
    )
    samples_N = torch.cat(shown)
    labels_N = torch.from_numpy(source.labels[samples_N.numpy()])
    return Features(torch.cat(xs), labels_N.to(device), samples_N)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network is in evaluation mode inside the `with` block."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
