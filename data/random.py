"""Counter-based random numbers: the value is a pure function of a seed and some counters.

There is no stream and no state. So a draw does not depend on earlier draws, on the process, or on numpy's generators,
whose streams may change between versions.

Source: the finaliser and the increment of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014; constants as in Vigna's public-domain splitmix64.c). Counters are absorbed one at a time;
the draws are then the outputs of SplitMix64 started from the resulting state.
"""

import numpy as np
from numpy.typing import NDArray

Counter = int | NDArray[np.integer]

# The first counter of each use of the generator, so that no two uses get the same numbers.
ORDER, VIEWS, NETWORK, BANK, BLOCKS, SUBSET = 1, 2, 3, 4, 5, 6

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finaliser, a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(counter: Counter) -> NDArray[np.uint64]:
    """Return a counter as 64-bit words, at least 1-d: numpy warns of wrap-around on scalars but not on arrays."""
    if isinstance(counter, int):
        return np.array([counter & _MASK], np.uint64)
    return np.atleast_1d(counter).astype(np.uint64)


def hash_counters(seed: int, *counters: Counter) -> NDArray[np.uint64]:
    """Return 64 random bits for each combination of counters.

    For a fixed seed and fixed other counters, the result is a bijection of the last counter: different counters never
    collide.

    Args:
        seed: The seed.
        counters: Integers, or integer arrays that broadcast.

    Returns:
        uint64 in the broadcast shape of the counters, at least 1-d.
    """
    state = _mix(_words(seed) + _GAMMA)
    for counter in counters:
        state = _mix((state ^ _words(counter)) + _GAMMA)
    return state


def uniform(seed: int, *counters: Counter, draws: int) -> NDArray[np.float64]:
    """Return `draws` numbers in [0, 1) with 53 random bits for each combination of counters: float64 [..., draws]."""
    start = hash_counters(seed, *counters)[..., None]
    bits = _mix(start + np.arange(1, draws + 1, dtype=np.uint64) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
