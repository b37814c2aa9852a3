from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import functional as tvf

from data.batch import Batch, Crops
from data.cpu import render, render_center
from data.loader import eval_batches, train_batches
from data.normalize import normalize, normalize_fused
from data.order import batch_samples
from data.sources.base import Source, UnreadableImage
from data.sources.folder import ImageFolder
from data.sources.open import open_source
from data.views import Augment, View, draw
from tests.data.images import photograph, write_folder
from tests.data.settings import CPU, data_settings

VIEWS = [View(size=32), View(size=32), View(size=16, scale=(0.05, 0.14))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """24 readable images."""
    return open_source(write_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture
def damaged(tmp_path: Path) -> Source:
    """24 images; 0, 5, 6 and 23 cannot be read."""
    root = write_folder(tmp_path / "data")
    source = ImageFolder.scan(root)
    for i in (0, 5, 6, 23):
        (root / source.name(i)).write_bytes(b"nothing")
    return source


class Broken:
    """`count` images; only `good` can be read."""

    def __init__(self, count: int, good: int) -> None:
        self.classes = ["c"]
        self.count, self.good = count, good

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.zeros(self.count, np.int64)

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"sample {i}"

    def read(self, i: int) -> NDArray[np.uint8]:
        return self.image(i)

    def image(self, i: int) -> NDArray[np.uint8]:
        if i != self.good:
            raise UnreadableImage(f"{self.name(i)}: broken")
        return photograph(20, 20)


def train(
    source: Source,
    start: int = 0,
    stop: int = 4,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = 8,
    seed: int = 3,
    views: list[View] = VIEWS,
) -> Iterator[Batch]:
    augment = Augment(solarize=0.2)
    settings = data_settings(views=tuple(views), augment=augment, batch_size=batch_size, workers=workers)
    return train_batches(source, settings, seed, rank, world_size, start, stop, CPU)


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.samples.tolist() == y.samples.tolist()
        assert x.unreadable == y.unreadable
        assert len(x.views) == len(y.views)
        assert all(torch.equal(v, w) for v, w in zip(x.views, y.views, strict=True))


def joined(parts: tuple[Batch, ...]) -> Batch:
    """Join local batches to the global one."""
    views = [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)]
    unreadable = [image for part in parts for image in part.unreadable]
    return Batch(views, torch.cat([part.samples for part in parts]), unreadable)


def test_a_batch_has_the_rendered_views_of_its_images(source: Source) -> None:
    batches = list(train(source))
    assert len(batches) == 4
    for step, batch in enumerate(batches):
        epoch, samples = batch_samples(24, 3, step, 8, 0, 1)
        assert epoch == step // 3
        assert batch.samples.dtype == torch.int64
        assert batch.samples.tolist() == samples.tolist()
        assert batch.unreadable == []
        for v, (pixels, view) in enumerate(zip(batch.views, VIEWS, strict=True)):
            assert pixels.dtype == torch.uint8
            assert pixels.shape == (8, view.size, view.size, 3)
            params = draw(3, epoch, samples, v, view, Augment(solarize=0.2))
            for i, sample in enumerate(samples.tolist()):
                assert (pixels[i].numpy() == render(source.image(sample), params, i, view.size)).all()


def test_views_epochs_and_seeds_differ(source: Source) -> None:
    first, *_, second_epoch = train(source, stop=2, batch_size=24)
    (other_seed,) = train(source, stop=1, batch_size=24, seed=4)
    assert not torch.equal(first.views[0], first.views[1])
    for other in (second_epoch, other_seed):
        assert other.samples.sort()[0].tolist() == first.samples.sort()[0].tolist()
        same_order = first.views[0][first.samples.argsort()]
        pairs = zip(same_order, other.views[0][other.samples.argsort()], strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs)


def test_fewer_views_are_the_same_views(source: Source) -> None:
    (one,) = train(source, stop=1, views=VIEWS[:1])
    (all_views,) = train(source, stop=1)
    assert torch.equal(one.views[0], all_views.views[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_make_the_same_global_batch(source: Source, world_size: int) -> None:
    ranks = [train(source, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same([joined(parts) for parts in zip(*ranks, strict=True)], list(train(source)))


def test_workers_make_the_same_batches(source: Source, damaged: Source) -> None:
    for data in (source, damaged):
        assert_same(list(train(data, workers=2)), list(train(data, workers=0)))


def test_resuming_gives_the_remaining_batches(source: Source) -> None:
    straight = list(train(source, stop=8))
    assert_same(list(train(source, start=5, stop=8)), straight[5:])
    ranks = [train(source, start=5, stop=8, rank=rank, world_size=2) for rank in range(2)]
    assert_same([joined(parts) for parts in zip(*ranks, strict=True)], straight[5:])
    assert list(train(source, start=8, stop=8)) == []


def test_idx_with_workers(tmp_path: Path) -> None:
    images = np.stack([photograph(28, 28, seed)[..., 0] for seed in range(16)])
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "x-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 16]) + bytes(16))
    source = open_source(tmp_path / "x-images-idx3-ubyte")
    assert_same(list(train(source, workers=1)), list(train(source)))


def test_torchs_generator_is_not_used(source: Source) -> None:
    # Otherwise the model's random numbers after a resume would differ from those of an uninterrupted run.
    before = torch.random.get_rng_state()
    list(train(source, stop=1))
    list(eval_batches(source, np.arange(4), 16, 4, workers=0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unreadable_samples_are_replaced_and_listed(damaged: Source) -> None:
    replaced = {0: [1], 5: [6, 7], 6: [7], 23: [0, 1]}
    seen = []
    for step, batch in enumerate(train(damaged, stop=3)):
        samples = batch_samples(24, 3, step, 8, 0, 1)[1]
        expected_bad = []
        for i, (sample, shown) in enumerate(zip(samples.tolist(), batch.samples.tolist(), strict=True)):
            tried = [sample, *replaced.get(sample, [])]
            assert shown == tried[-1]
            expected_bad += tried[:-1]
            params = draw(3, 0, samples, 0, VIEWS[0], Augment(solarize=0.2))  # the parameters of the unreadable image
            assert (batch.views[0][i].numpy() == render(damaged.image(shown), params, i, 32)).all()
        assert [sample for sample, _ in batch.unreadable] == expected_bad
        assert all(reason.startswith(damaged.name(sample)) for sample, reason in batch.unreadable)
        seen += expected_bad
    assert sorted(set(seen)) == [0, 5, 6, 23]


def test_more_than_a_hundred_unreadable_in_a_row() -> None:
    seed = next(s for s in range(10_000) if batch_samples(200, s, 0, 1, 0, 1)[1][0] == 0)  # the first image is 0
    (batch,) = train(Broken(200, good=99), stop=1, batch_size=1, seed=seed)
    assert batch.samples.tolist() == [99]
    assert len(batch.unreadable) == 99
    with pytest.raises(ValueError, match=r"100 images in a row cannot be read, the last is sample 99: broken"):
        list(train(Broken(200, good=100), stop=1, batch_size=1, seed=seed))


def test_nothing_readable() -> None:
    for workers in (0, 1):
        with pytest.raises(ValueError, match="5 images in a row cannot be read"):
            list(train(Broken(5, good=-1), stop=1, batch_size=2, workers=workers))


def test_errors_are_raised_before_iterating(source: Source) -> None:
    with pytest.raises(ValueError, match="24 images do not fill one batch of 25"):
        train(source, batch_size=25)
    with pytest.raises(ValueError, match="8 does not divide evenly among 3"):
        train(source, world_size=3)


# Evaluation


def joined_eval(batches: list[Batch]) -> tuple[Tensor, list[int], list[int]]:
    batch = joined(tuple(batches))
    (pixels,) = batch.views
    return pixels, batch.samples.tolist(), [sample for sample, _ in batch.unreadable]


def test_eval_batches(source: Source) -> None:
    asked = np.array([7, 3, 3, 20, 11])
    batches = list(eval_batches(source, asked, 32, batch_size=2, workers=0))
    assert [len(batch.samples) for batch in batches] == [2, 2, 1]
    pixels, samples, bad = joined_eval(batches)
    assert samples == asked.tolist()
    assert bad == []
    assert pixels.dtype == torch.uint8
    assert (pixels.numpy() == np.stack([render_center(source.image(i), 32) for i in asked])).all()


def test_eval_of_the_crops_of_an_epoch(source: Source) -> None:
    """They equal the views of training."""
    *_, shown = train(source, stop=4, batch_size=8, seed=5)  # the first batch of the second epoch
    crops = Crops(VIEWS[0], Augment(solarize=0.2), 5, 1)
    (batch,) = eval_batches(source, shown.samples.numpy(), VIEWS[0].size, 8, 0, crops)
    assert batch.samples.tolist() == shown.samples.tolist()
    assert torch.equal(batch.views[0], shown.views[0])
    assert not batch.unreadable


def test_eval_skips_unreadable_images(damaged: Source) -> None:
    batches = list(eval_batches(damaged, np.arange(24), 16, batch_size=7, workers=2))
    pixels, samples, bad = joined_eval(batches)
    assert bad == [0, 5, 6, 23]
    assert samples == [i for i in range(24) if i not in bad]
    assert pixels.shape == (20, 16, 16, 3)
    assert all((p.numpy() == render_center(damaged.image(i), 16)).all() for p, i in zip(pixels, samples, strict=True))
    assert batches[0].unreadable[0][1].startswith(damaged.name(0))


def test_eval_of_nothing_readable(damaged: Source) -> None:
    (batch,) = eval_batches(damaged, np.array([5, 6]), 16, batch_size=2, workers=0)
    assert batch.views[0].shape == (0, 16, 16, 3)
    assert batch.samples.shape == (0,)
    assert len(batch.unreadable) == 2
    assert list(eval_batches(damaged, np.array([], np.int64), 16, batch_size=2, workers=0)) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        eval_batches(damaged, np.arange(2), 16, batch_size=0, workers=0)


# Normalisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (4, 9, 9, 3), dtype=torch.uint8)
    before = images.clone()
    out = normalize(images, CPU, dtype)
    assert out.dtype == dtype
    assert out.shape == (4, 3, 9, 9)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    theirs = tvf.normalize(images.permute(0, 3, 1, 2).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(out, theirs.to(dtype), atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_normalisation_rounds_once(dtype: torch.dtype) -> None:
    """There is one operation, which makes no copy in float32 and no products in a low precision."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(2, 16, 8, 3)
    out = normalize_fused(images, dtype)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), normalize(images, CPU), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_normalize_known_values() -> None:
    black, white = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    assert normalize(black, CPU).flatten().tolist() == pytest.approx([-2.117904, -2.035714, -1.804444])
    assert normalize(white, CPU).flatten().tolist() == pytest.approx([2.248908, 2.428571, 2.64])
    assert normalize(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), CPU).shape == (0, 3, 8, 8)
