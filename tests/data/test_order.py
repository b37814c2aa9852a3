from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from data.order import Blocks, batch_samples, epoch_order, samples_between, steps_per_epoch


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 65537])
def test_permutation(n: int) -> None:
    order = epoch_order(n, seed=3, epoch=7)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


def test_golden() -> None:
    # A change of these values would silently change every resumed run.
    assert epoch_order(10, 0, 0).tolist() == [1, 6, 5, 4, 8, 3, 7, 9, 2, 0]
    assert epoch_order(10, 0, 1).tolist() == [1, 6, 9, 4, 7, 5, 2, 8, 3, 0]
    assert epoch_order(10, 1, 0).tolist() == [8, 1, 9, 7, 2, 6, 5, 4, 0, 3]


def test_epochs_and_seeds_are_unrelated() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # of two random permutations, 1 on average
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_all_permutations_are_equally_likely() -> None:
    n = 2400
    counts = Counter(tuple(epoch_order(4, 0, epoch).tolist()) for epoch in range(n))
    assert len(counts) == 24
    expected = n / 24
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 50  # 23 degrees of freedom, p = 0.001


def test_the_order_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_read_the_global_batch(world_size: int) -> None:
    for step in (0, 3, 4, 11):
        epoch, batch = batch_samples(53, 5, step, 12, 0, 1)
        parts = [batch_samples(53, 5, step, 12, rank, world_size) for rank in range(world_size)]
        assert {e for e, _ in parts} == {epoch}
        assert [len(samples) for _, samples in parts] == [12 // world_size] * world_size
        assert np.concatenate([samples for _, samples in parts]).tolist() == batch.tolist()


def test_steps_run_through_epochs() -> None:
    steps = [batch_samples(53, 5, step, 12, 0, 1) for step in range(9)]  # 4 per epoch, with a remainder of 5 images
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
    with pytest.raises(ValueError, match="11 images do not fill one batch of 12"):
        steps_per_epoch(11, 12)
    with pytest.raises(ValueError, match="batch_size is 0"):
        steps_per_epoch(11, 0)
    with pytest.raises(ValueError, match="12 does not divide evenly among 5"):
        batch_samples(53, 5, 0, 12, 0, 5)


# In blocks


def in_blocks(n: int, seed: int, epoch: int, size: int, window: int) -> NDArray[np.int64]:
    return samples_between(n, seed, epoch, 0, n, Blocks(size, window))


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 4097])
@pytest.mark.parametrize(("size", "window"), [(1, 1), (1, 5), (3, 1), (8, 4), (100, 16), (5000, 2)])
def test_blocks_are_a_permutation(n: int, size: int, window: int) -> None:
    order = in_blocks(n, 3, 7, size, window)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


def test_blocks_golden() -> None:
    # A change of these values would silently change every resumed run with this order.
    assert in_blocks(10, 0, 0, 2, 2).tolist() == [1, 6, 7, 0, 8, 3, 9, 2, 5, 4]
    assert in_blocks(10, 0, 1, 2, 2).tolist() == [1, 2, 3, 0, 9, 4, 5, 8, 6, 7]


def test_a_window_has_complete_random_blocks() -> None:
    size, window = 10, 4
    order = in_blocks(1000, 1, 2, size, window)
    windows = [set((order[place : place + size * window] // size).tolist()) for place in range(0, 1000, size * window)]
    assert [len(blocks) for blocks in windows] == [window] * 25
    assert len(set.union(*windows)) == 100
    assert sum(max(blocks) - min(blocks) for blocks in windows) > 25 * 40  # the mean is 60 for random blocks of 100
    changes = (np.diff(order // size) != 0).sum()
    assert changes > 600  # images are mixed within a window: 3 of 4 neighbours are in different blocks


@pytest.mark.parametrize("size", [1, 7, 64])
def test_positions_of_an_epoch_in_blocks(size: int) -> None:
    whole = in_blocks(500, 2, 1, size, 3)
    for start in range(0, 500, 23):
        for stop in (start + 1, min(500, start + 23), 500):
            assert samples_between(500, 2, 1, start, stop, Blocks(size, 3)).tolist() == whole[start:stop].tolist()


def test_blocks_differ_between_epochs_and_seeds() -> None:
    orders = [in_blocks(1000, seed, epoch, 8, 4) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_a_window_of_all_blocks_is_the_global_order() -> None:
    assert in_blocks(1000, 5, 3, 10, 100).tolist() == epoch_order(1000, 5, 3).tolist()


# Both


@pytest.mark.parametrize("blocks", [None, Blocks(16, 4)], ids=["global", "block"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_five_epochs_have_each_sample_once(blocks: Blocks | None, world_size: int) -> None:
    n, batch = 1000, 42  # 23 steps, with a remainder of 34 images
    dropped = []
    for epoch in range(5):
        read: list[int] = []
        for step in range(23 * epoch, 23 * (epoch + 1)):
            for rank in range(world_size):
                its_epoch, samples = batch_samples(n, 9, step, batch, rank, world_size, blocks)
                assert its_epoch == epoch
                read += samples.tolist()
        assert len(read) == len(set(read)) == 23 * batch
        dropped.append(frozenset(range(n)) - set(read))
    assert len(set(dropped)) == 5  # each epoch drops other images
    assert batch_samples(n, 9, 5 * 23, batch, 0, world_size, blocks)[0] == 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_resuming_in_blocks_is_a_slice_even_with_other_ranks(world_size: int) -> None:
    blocks = Blocks(8, 2)
    straight = np.concatenate([batch_samples(100, 1, step, 12, 0, 1, blocks)[1] for step in range(30)])
    resumed = [
        batch_samples(100, 1, step, 12, r, world_size, blocks)[1] for step in range(17, 30) for r in range(world_size)
    ]
    assert np.concatenate(resumed).tolist() == straight[17 * 12 :].tolist()
