from collections import Counter

import numpy as np
import pytest

from data.order import batch_samples, epoch_order, steps_per_epoch


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 65537])
def test_permutation(n: int) -> None:
    order = epoch_order(n, seed=3, epoch=7)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


def test_golden() -> None:
    # Changing these changes every run: a resumed one would silently become another.
    assert epoch_order(10, 0, 0).tolist() == [1, 6, 5, 4, 8, 3, 7, 9, 2, 0]
    assert epoch_order(10, 0, 1).tolist() == [1, 6, 9, 4, 7, 5, 2, 8, 3, 0]
    assert epoch_order(10, 1, 0).tolist() == [8, 1, 9, 7, 2, 6, 5, 4, 0, 3]


def test_epochs_and_seeds_are_unrelated() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # of two random permutations, 1 on average
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_all_permutations_are_as_likely() -> None:
    n = 2400
    counts = Counter(tuple(epoch_order(4, 0, epoch).tolist()) for epoch in range(n))
    assert len(counts) == 24
    expected = n / 24
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 50  # 23 degrees of freedom, p = 0.001


def test_order_is_protected_from_its_users() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 1


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_read_the_global_batch(world: int) -> None:
    for step in (0, 3, 4, 11):
        epoch, batch = batch_samples(53, 5, step, 12, 0, 1)
        parts = [batch_samples(53, 5, step, 12, rank, world) for rank in range(world)]
        assert {e for e, _ in parts} == {epoch}
        assert [len(samples) for _, samples in parts] == [12 // world] * world
        assert np.concatenate([samples for _, samples in parts]).tolist() == batch.tolist()


def test_steps_run_through_epochs() -> None:
    steps = [batch_samples(53, 5, step, 12, 0, 1) for step in range(9)]  # 4 to an epoch, 5 samples left over
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    for epoch in (0, 1):
        read = np.concatenate([samples for e, samples in steps if e == epoch])
        assert read.tolist() == epoch_order(53, 5, epoch)[:48].tolist()


def test_resuming_is_a_slice_even_with_other_ranks() -> None:
    straight = np.concatenate([batch_samples(100, 1, step, 8, 0, 1)[1] for step in range(30)])
    resumed = np.concatenate(
        [batch_samples(100, 1, step, 8, rank, 4)[1] for step in range(17, 30) for rank in range(4)]
    )
    assert resumed.tolist() == straight[17 * 8 :].tolist()


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(53, 12) == 4
    assert steps_per_epoch(12, 12) == 1
    assert steps_per_epoch(1_281_167, 256) == 5004  # ImageNet


def test_errors() -> None:
    with pytest.raises(ValueError, match="11 samples do not fill one batch of 12"):
        steps_per_epoch(11, 12)
    with pytest.raises(ValueError, match="batch_size is 0"):
        steps_per_epoch(11, 0)
    with pytest.raises(ValueError, match="12 does not divide evenly among 5"):
        batch_samples(53, 5, 0, 12, 0, 5)
