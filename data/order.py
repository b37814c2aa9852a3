"""The order of the images: a stateless function of (seed, step), split among the ranks.

The global batch of a step does not depend on the number of ranks or workers, so resuming is arithmetic. An epoch shows
each image once, except for the remainder that does not fill a batch.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.random import BLOCKS, ORDER, hash_counters


class Blocks(NamedTuple):
    """The order `block`, for storage with slow random access; without it images are shuffled globally.

    An epoch is split into blocks of `size` consecutive images. The blocks are shuffled, and the images of each `window`
    successive blocks are shuffled together. So images are read from `window` regions at a time, and a batch mixes the
    images of these regions only.
    """

    size: int
    window: int


# One entry is enough because all steps of an epoch use it; for the 14 M images of ImageNet-22k it takes 112 MB in each
# worker.
@lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the global order of an epoch: a permutation of range(n), int64 [n], read-only.

    The images are sorted by a hash of (seed, epoch, sample). Hashes within an epoch are distinct, so the result does
    not depend on the sorting algorithm.
    """
    order = np.argsort(hash_counters(seed, ORDER, epoch, np.arange(n))).astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=1)
def _shuffled_blocks(n: int, seed: int, epoch: int, blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shuffled blocks of an epoch, and the position of each window's first image with n at the end."""
    count = -(-n // blocks.size)
    order = np.argsort(hash_counters(seed, BLOCKS, epoch, np.arange(count)))
    sizes = np.minimum(blocks.size, n - order * blocks.size)  # the last block may be short
    starts = np.concatenate([[0], np.cumsum(np.add.reduceat(sizes, np.arange(0, count, blocks.window)))])
    return order, starts


@lru_cache(maxsize=2)  # a batch may extend over two
def _window(n: int, seed: int, epoch: int, blocks: Blocks, window: int) -> NDArray[np.int64]:
    """Return the shuffled images of a window."""
    order, _ = _shuffled_blocks(n, seed, epoch, blocks)
    first = order[window * blocks.window : (window + 1) * blocks.window] * blocks.size
    samples = (first[:, None] + np.arange(blocks.size)).ravel()
    samples = samples[samples < n]
    return samples[np.argsort(hash_counters(seed, ORDER, epoch, samples))]


def samples_between(
    n: int, seed: int, epoch: int, start: int, stop: int, blocks: Blocks | None = None
) -> NDArray[np.int64]:
    """Return the images at positions `start` to `stop` - 1 of an epoch over `n` images, int64 [stop - start]."""
    if blocks is None:
        return epoch_order(n, seed, epoch)[start:stop]
    _, starts = _shuffled_blocks(n, seed, epoch, blocks)
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    windows = [_window(n, seed, epoch, blocks, w) for w in range(first, last + 1)]
    return np.concatenate(windows)[start - starts[first] : stop - starts[first]]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of full global batches in an epoch; each epoch drops another remainder.

    Raises:
        ValueError: `n` images do not fill a batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if n < batch_size:
        raise ValueError(f"{n} images do not fill one batch of {batch_size}: use a smaller batch_size or more data")
    return n // batch_size


def check_divides(batch_size: int, world_size: int) -> None:
    """Raise ValueError if a global batch cannot be split evenly among the ranks."""
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} does not divide evenly among {world_size} ranks")


def batch_samples(
    n: int, seed: int, step: int, batch_size: int, rank: int, world_size: int, blocks: Blocks | None = None
) -> tuple[int, NDArray[np.int64]]:
    """Return the epoch of a global step and the images of a rank's local batch.

    Args:
        n: Number of images in the data set.
        seed: Seed of the order.
        step: Global step, from 0.
        batch_size: Size of the global batch.
        rank: The rank, which gets a contiguous slice of the global batch.
        world_size: Number of ranks.
        blocks: Blocks of the order; None for a global one.

    Returns:
        The epoch, and the images as int64 [batch_size // world_size].

    Raises:
        ValueError: `world_size` does not divide `batch_size`, or `n` images do not fill a batch.
    """
    check_divides(batch_size, world_size)
    assert 0 <= rank < world_size
    assert step >= 0
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, batch_size))
    local = batch_size // world_size
    first = step_in_epoch * batch_size + rank * local
    return epoch, samples_between(n, seed, epoch, first, first + local, blocks)
