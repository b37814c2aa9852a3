"""The steps and samples of an epoch, counted through the loader."""

from typing import Literal

import pytest
import torch

from data.batch import Batch
from data.loader import train_batches
from data.order import Blocks, steps_per_epoch
from data.sources.base import Source
from data.sources.open import open_source
from data.views import View
from tests.data.images import write_folder
from tests.data.settings import CPU, data_settings

BLOCKS = pytest.mark.parametrize("blocks", [None, Blocks(5, 3)], ids=["global", "block"])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "dali"])
BATCH, SEED = 12, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """64 images: 5 steps of 12 and a remainder of 4."""
    return open_source(write_folder(tmp_path_factory.mktemp("data"), classes=4, per_class=16, size=12))


def batches(
    source: Source,
    backend: Literal["cpu", "dali"],
    blocks: Blocks | None,
    start: int,
    stop: int,
    rank: int,
    world_size: int,
) -> list[Batch]:
    settings = data_settings(views=(View(size=8), View(size=8)), batch_size=BATCH, backend=backend)
    if blocks:
        update = {"order": "block", "block_size": blocks.size, "block_window": blocks.window}
        settings = settings.model_copy(update=update)
    return list(train_batches(source, settings, SEED, rank, world_size, start, stop, CPU))


@BACKENDS
@BLOCKS
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_five_epochs(source: Source, backend: Literal["cpu", "dali"], blocks: Blocks | None, world_size: int) -> None:
    assert steps_per_epoch(len(source), BATCH) == 5
    ranks = [batches(source, backend, blocks, 0, 25, rank, world_size) for rank in range(world_size)]
    assert [len(steps) for steps in ranks] == [25] * world_size
    epochs = []
    for epoch in range(5):
        read = [s for steps in ranks for batch in steps[5 * epoch : 5 * epoch + 5] for s in batch.samples.tolist()]
        assert len(read) == len(set(read)) == 60
        epochs.append(frozenset(read))
    assert len(set(epochs)) > 1  # each epoch drops other samples


@BACKENDS
@BLOCKS
def test_the_next_ten_batches_after_a_stop(
    source: Source, backend: Literal["cpu", "dali"], blocks: Blocks | None
) -> None:
    straight = batches(source, backend, blocks, 0, 23, 0, 1)[13:]
    for world_size in (1, 2, 3):
        ranks = [batches(source, backend, blocks, 13, 23, rank, world_size) for rank in range(world_size)]
        for whole, *parts in zip(straight, *ranks, strict=True):
            assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
            for v, view in enumerate(whole.views):
                assert torch.equal(view, torch.cat([part.views[v] for part in parts]))
