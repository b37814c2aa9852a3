"""Which samples each step sees: a stateless function of (seed, step), cut by rank.

The global batch of a step does not depend on the number of ranks or workers, so resuming is arithmetic. In an epoch
each sample comes once, but for the remainder that does not fill a batch.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.random import BLOCKS, ORDER, hash_counters


class Blocks(NamedTuple):
    """The order `block`, for storage that hates random reads; without it samples are shuffled globally.

    The epoch is cut into blocks of `size` consecutive samples, the blocks are shuffled, and the samples of each
    `window` blocks that follow one another are shuffled together. So at any time samples of `window` places are read,
    and a batch mixes no more than these.
    """

    size: int
    window: int


# One entry: every step of an epoch asks for it, and at ImageNet-22k's 14 M samples it is 112 MB in each worker.
@lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The global order of the `n` samples in an epoch: a permutation of range(n), int64 [n], read-only.

    The samples sorted by a hash of (seed, epoch, sample). Hashes of one epoch are distinct, so the result does not
    depend on the sorting algorithm.
    """
    order = np.argsort(hash_counters(seed, ORDER, epoch, np.arange(n))).astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=1)
def _shuffled_blocks(n: int, seed: int, epoch: int, blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The blocks of an epoch in their order, and the place of each window's first sample, with n at the end."""
    count = -(-n // blocks.size)
    order = np.argsort(hash_counters(seed, BLOCKS, epoch, np.arange(count)))
    sizes = np.minimum(blocks.size, n - order * blocks.size)  # the last block may be short
    starts = np.concatenate([[0], np.cumsum(np.add.reduceat(sizes, np.arange(0, count, blocks.window)))])
    return order, starts


@lru_cache(maxsize=2)  # a batch may lie in two
def _window(n: int, seed: int, epoch: int, blocks: Blocks, window: int) -> NDArray[np.int64]:
    """The samples of a window in their order."""
    order, _ = _shuffled_blocks(n, seed, epoch, blocks)
    first = order[window * blocks.window : (window + 1) * blocks.window] * blocks.size
    samples = (first[:, None] + np.arange(blocks.size)).ravel()
    samples = samples[samples < n]
    return samples[np.argsort(hash_counters(seed, ORDER, epoch, samples))]


def samples_between(
    n: int, seed: int, epoch: int, start: int, stop: int, blocks: Blocks | None = None
) -> NDArray[np.int64]:
    """The samples at places `start` to `stop` - 1 of an epoch, int64 [stop - start]."""
    if blocks is None:
        return epoch_order(n, seed, epoch)[start:stop]
    _, starts = _shuffled_blocks(n, seed, epoch, blocks)
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    windows = [_window(n, seed, epoch, blocks, w) for w in range(first, last + 1)]
    return np.concatenate(windows)[start - starts[first] : stop - starts[first]]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Full global batches in an epoch; the remainder is dropped (other samples in each epoch).

    Raises ValueError if there is not even one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if n < batch_size:
        raise ValueError(f"{n} samples do not fill one batch of {batch_size}: use a smaller batch_size or more data")
    return n // batch_size


def batch_samples(
    n: int, seed: int, step: int, batch_size: int, rank: int, world_size: int, blocks: Blocks | None = None
) -> tuple[int, NDArray[np.int64]]:
    """The epoch of global step `step` and the samples that `rank` of `world` reads there.

    `batch_size` is the global one; the samples are int64 [batch_size // world], the rank's contiguous slice.
    Raises ValueError if `world` does not divide `batch_size`, or `n` < `batch_size`.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} does not divide evenly among {world_size} ranks")
    assert 0 <= rank < world_size
    assert step >= 0
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, batch_size))
    local = batch_size // world_size
    first = step_in_epoch * batch_size + rank * local
    return epoch, samples_between(n, seed, epoch, first, first + local, blocks)
