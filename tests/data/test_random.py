import numpy as np
import pytest
from numpy.typing import NDArray

from data.random import ORDER, VIEWS, hash_counters, uniform

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15

# The first outputs of splitmix64.c for the seed 1234567, as published with many implementations of it.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def splitmix64(state: int, count: int) -> list[int]:
    """SplitMix64 in Python's own integers."""
    out = []
    for _ in range(count):
        state = (state + GAMMA) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_published_vectors() -> None:
    # Without counters the hash is the first output, and GAMMA advances the generator's state.
    assert [int(hash_counters(1234567 + i * GAMMA)[0]) for i in range(5)] == PUBLISHED
    assert int(hash_counters(0)[0]) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567, 5) == PUBLISHED  # so the plain version above is right


def test_counters_are_absorbed_as_documented() -> None:
    state = 5
    for counter in (0, 3, 7, 2**40):
        (state,) = splitmix64(state ^ counter, 1)
    assert int(hash_counters(5, 3, 7, 2**40)[0]) == state
    assert uniform(5, 3, 7, 2**40, draws=3)[0].tolist() == [bits / 2**53 for bits in _shifted(state)]


def _shifted(state: int) -> list[int]:
    return [word >> 11 for word in splitmix64(state, 3)]


def test_golden() -> None:
    # A change of these values would silently change every resumed run.
    assert hash_counters(7, 1, 2, np.arange(3)).tolist() == [
        5105604414344456748,
        8104936063594381618,
        16354356887505066221,
    ]
    assert uniform(7, 2, 3, draws=4).tolist() == [
        [0.8832556164871559, 0.7256975590665586, 0.695532450898916, 0.1470697561265467]
    ]


def test_shapes_and_broadcasting() -> None:
    samples = np.array([4, 9, 4])
    u = uniform(0, VIEWS, 1, samples, 2, draws=6)
    assert u.shape == (3, 6)
    assert u.dtype == np.float64
    assert u[0].tolist() == u[2].tolist() == uniform(0, VIEWS, 1, 4, 2, draws=6)[0].tolist()
    assert hash_counters(0, samples[:, None], np.arange(2)).shape == (3, 2)
    # More draws only append.
    assert (uniform(0, VIEWS, 1, samples, 2, draws=9)[:, :6] == u).all()


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1])
def test_any_seed_is_taken_without_warnings(seed: int, recwarn: pytest.WarningsRecorder) -> None:
    assert (uniform(seed, 1, np.arange(-2, 2), draws=2) < 1).all()
    assert not recwarn.list


def test_every_counter_and_its_position_matter() -> None:
    values = {
        int(hash_counters(*c)[0]) for c in [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (1, 1)]
    }
    assert len(values) == 8
    assert ORDER != VIEWS


def test_no_collisions_in_the_last_counter() -> None:
    assert len(np.unique(hash_counters(3, ORDER, 8, np.arange(1 << 18)))) == 1 << 18


@pytest.mark.parametrize("axis", ["draws", "samples", "epochs", "seeds"])
def test_uniform_in_every_direction(axis: str) -> None:
    n = 1 << 14
    if axis == "draws":
        u = uniform(1, 2, draws=n).ravel()
    elif axis == "samples":
        u = uniform(1, 2, np.arange(n), draws=1).ravel()
    elif axis == "epochs":
        u = uniform(1, np.arange(n), 2, draws=1).ravel()
    else:
        u = np.array([uniform(seed, 2, draws=1)[0, 0] for seed in range(n)])
    assert u.min() >= 0
    assert u.max() < 1
    assert 25 < _chi_square(u) < 115  # 63 degrees of freedom: outside in fewer than 1 of 10,000 cases
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)


def _chi_square(u: NDArray[np.float64], bins: int = 64) -> float:
    counts = np.bincount((u * bins).astype(int), minlength=bins)
    expected = len(u) / bins
    return float(((counts - expected) ** 2 / expected).sum())


def test_one_changed_bit_changes_half_of_the_bits() -> None:
    base = int(hash_counters(0, 12345)[0])
    changed = [(base ^ int(hash_counters(0, 12345 ^ (1 << bit))[0])).bit_count() for bit in range(64)]
    assert 30 < np.mean(changed) < 34
    assert min(changed) > 12
