"""Features of a data set from a frozen network."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data.batch import Crops
from data.loader import eval_batches
from data.sources.base import Source
from models.encoder import Encoder
from trainer.distributed import raise_on_all_ranks

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of n samples.

    Attributes:
        x_ND: Unit rows, fp32 [N, D], on the device.
        labels_N: Class indices, int64 [N], on the device.
        samples_N: Indices of the samples, int64 [N], in host memory.
    """

    x_ND: Tensor
    labels_N: Tensor
    samples_N: Tensor


def image_size(config: "Config") -> int:
    """Return the side of the evaluated images in pixels: eval.size, or that of the first view."""
    return config.eval.size or config.data.views[0].size


@torch.no_grad()
def forward_images(
    network: nn.Module,
    function: Callable[[Tensor], Tensor],
    source: Source,
    samples: NDArray[np.int64],
    device: torch.device,
    config: "Config",
    crops: Crops | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Apply a function to the images of a data set, in batches and in order.

    Unreadable images are skipped; the log says how many there were.

    Args:
        network: Is in evaluation mode while `function` runs.
        function: Takes normalised images [B, 3, H, W] of the type of run.precision, in its autocast; fp32 if the
            network has no parameters.
        source: The data set.
        samples: Indices of the images, int64 [N].
        device: Where the network is.
        config: Gives image size, batch size, precision and number of workers.
        crops: Random crops to take of the images; None for the central view.

    Yields:
        The function's values, fp32 [B, …], and the samples that they belong to, int64 [B].
    """
    from trainer.build import autocast_dtype

    dtype = autocast_dtype(config, device)
    # The first layer would cast its input to autocast's type. Pixels that no layer takes keep their values.
    input_dtype = dtype if next(network.parameters(), None) is not None else torch.float32
    unreadable: list[tuple[int, str]] = []
    for batch in eval_batches(
        source,
        samples,
        image_size(config),
        config.eval.batch_size,
        config.data.workers_for(device),
        crops,
        config.eval.crop,
        config.data,
        device,
    ):
        unreadable += batch.unreadable
        if len(batch.samples):
            with evaluation_mode(network), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                x = function(*batch.normalized(device, input_dtype))
            yield x.float(), batch.samples
    if unreadable:
        first = unreadable[0][1]
        log.warning("skipped %d of %d images that cannot be read, such as %s", len(unreadable), len(samples), first)


def embed(
    network: nn.Module,
    source: Source,
    samples: NDArray[np.int64],
    device: torch.device,
    config: "Config",
) -> Features:
    """Compute the features of the central views of some samples. Collective.

    Args:
        network: Maps images [B, 3, S, S] to features [B, D], on `device`: a backbone, or `nn.Flatten()` for the pixels.
            An `Encoder` gives the embeddings of its head.
        source: The data set.
        samples: Indices of this rank's samples, int64 [N].
        device: Where the features are computed and kept.
        config: See `forward_images`.

    Raises:
        ValueError: On all ranks, if a rank can read none of its images.
    """
    function = (lambda x_BCHW: network([x_BCHW])) if isinstance(network, Encoder) else network
    xs, numbers = [], []
    for x_BD, batch_samples in forward_images(network, function, source, samples, device, config):
        xs.append(F.normalize(x_BD, dim=1))
        numbers.append(batch_samples)
    raise_on_all_ranks(
        None if xs else f"none of {len(samples)} images can be read, such as {source.name(int(samples[0]))}"
    )
    samples_N = torch.cat(numbers)
    labels_N = torch.from_numpy(source.labels[samples_N.numpy()])
    return Features(torch.cat(xs), labels_N.to(device), samples_N)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network in evaluation mode inside the `with` block. Parts that were in it before stay in it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
