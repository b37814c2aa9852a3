"""Which samples each step sees: a stateless function of (seed, step), cut by rank.

The global batch of a step does not depend on the number of ranks or workers, so resuming is arithmetic.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.random import ORDER, hash_counters


# One entry: every step of an epoch asks for it, and at ImageNet-22k's 14 M samples it is 112 MB in each worker.
@lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the `n` samples in an epoch: a permutation of range(n), int64 [n], read-only.

    The samples sorted by a hash of (seed, epoch, sample). Hashes of one epoch are distinct, so the result does not
    depend on the sorting algorithm.
    """
    order = np.argsort(hash_counters(seed, ORDER, epoch, np.arange(n))).astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


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
    n: int, seed: int, step: int, batch_size: int, rank: int, world: int
) -> tuple[int, NDArray[np.int64]]:
    """The epoch of global step `step` and the samples that `rank` of `world` reads there.

    `batch_size` is the global one; the samples are int64 [batch_size // world], the rank's contiguous slice.
    Raises ValueError if `world` does not divide `batch_size`, or `n` < `batch_size`.
    """
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide evenly among {world} ranks")
    assert 0 <= rank < world
    assert step >= 0
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, batch_size))
    local = batch_size // world
    first = step_in_epoch * batch_size + rank * local
    return epoch, epoch_order(n, seed, epoch)[first : first + local]
