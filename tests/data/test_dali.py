"""The DALI backend on the CPU, with the graph of a GPU: pixels, order, resuming, and unreadable images."""

import gc
import io
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data import dali, reader
from data.batch import Batch, Crops, TrainDataset
from data.loader import eval_batches, train_batches
from data.order import batch_samples
from data.sources.base import Source
from data.sources.folder import ImageFolder
from data.sources.open import open_source
from data.views import Augment, View
from tests.data.images import photograph, write_folder
from tests.data.photos import FOLDER, jpeg, write_photos
from tests.data.settings import CPU, data_settings
from tests.data.test_loader import Broken, assert_same, joined

NOTHING = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0}
JITTER = NOTHING | {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
MULTI_CROP = [View(size=112), View(size=112), View(size=48, scale=(0.05, 0.14)), View(size=72, scale=(0.1, 0.4))]


def make_batches(
    source: Source,
    views: list[View],
    augment: Augment,
    backend: str = "dali",
    start: int = 0,
    stop: int = 4,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = 8,
) -> list[Batch]:
    """Return the batches of a backend. Without worker processes DALI's reader runs in this process."""
    assert backend in ("cpu", "dali")
    settings = data_settings(
        views=tuple(views), augment=augment, batch_size=batch_size, workers=workers, backend=backend
    )
    return list(train_batches(source, settings, 3, rank, world_size, start, stop, CPU))


def distances(
    source: Source, views: list[View], augment: Augment, batches: int, batch_size: int
) -> NDArray[np.float64]:
    """Return the mean absolute difference between DALI's and the CPU backend's views, per view, in grey levels."""
    pairs = zip(
        *(make_batches(source, views, augment, b, stop=batches, batch_size=batch_size) for b in ("dali", "cpu")),
        strict=True,
    )
    found = []
    for ours, theirs in pairs:
        assert ours.samples.tolist() == theirs.samples.tolist()
        assert ours.unreadable == theirs.unreadable == []
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert a.dtype == torch.uint8
            assert a.shape == b.shape
            found.append((a.float() - b.float()).abs().mean((1, 2, 3)))
    return torch.cat(found).double().numpy()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """40 JPEG photographs; some are grey or rotated by EXIF."""
    return open_source(write_photos(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """24 small PNGs, which the reader decodes."""
    return open_source(write_folder(tmp_path_factory.mktemp("small")))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("crop", NOTHING),
        ("flip", NOTHING | {"flip": 1}),
        ("brightness", JITTER | {"brightness": 0.4}),
        ("contrast", JITTER | {"contrast": 0.4}),
        ("saturation", JITTER | {"saturation": 0.4}),
        ("hue", JITTER | {"hue": 0.1}),
        ("gray", NOTHING | {"gray": 1}),
        ("blur", NOTHING | {"blur": 1}),
        ("solarize", NOTHING | {"solarize": 1}),
    ],
)
def test_one_operation_matches_the_cpu_backend(photos: Source, name: str, settings: dict[str, float]) -> None:
    found = distances(photos, [View(size=96), View(size=96)], Augment(**settings), batches=4, batch_size=40)
    assert len(found) == 320
    assert found.max() <= 2, name  # the documented tolerance
    assert np.median(found) <= 0.5, name  # measured: rounding, and one pixel along the crop's edge


def test_all_operations_match_the_cpu_backend_in_multi_crop(photos: Source) -> None:
    found = distances(photos, MULTI_CROP, Augment(solarize=0.2), batches=3, batch_size=40)
    assert len(found) == 480
    assert found.max() <= 4
    assert np.median(found) <= 0.5


OWN = (  # views with augmentations of their own, besides AUGMENT for all
    View(size=64, augment=Augment(blur=1, flip=0, hue=0.5)),
    View(size=48, augment=Augment(blur=0, gray=0, solarize=1)),
    View(size=48),
)
AUGMENT = Augment(gray=1, flip=1)


def test_views_with_their_own_augmentations_match_the_cpu_backend(photos: Source) -> None:
    found = distances(photos, list(OWN), AUGMENT, batches=2, batch_size=40)
    assert found.max() <= 4
    assert np.median(found) <= 0.5


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_views_with_their_own_augmentations_resume(small: Source, backend: str) -> None:
    straight = make_batches(small, list(OWN), AUGMENT, backend, stop=5)
    assert_same(make_batches(small, list(OWN), AUGMENT, backend, start=3, stop=5), straight[3:])
    gray = [
        all((v[..., 0] == v[..., 1]).all() for v in views) for views in zip(*(b.views for b in straight), strict=True)
    ]
    assert gray == [True, False, True]


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no photographs in {FOLDER}")
def test_all_operations_on_other_photographs() -> None:
    source = open_source(FOLDER)
    batch = min(100, len(source))
    found = distances(source, [View(size=224), View(size=224), MULTI_CROP[2]], Augment(solarize=0.2), 2, batch)
    assert found.max() <= 4
    assert np.median(found) <= 0.5


def test_images_decoded_by_the_reader(small: Source) -> None:
    assert distances(small, MULTI_CROP, Augment(solarize=0.2), batches=3, batch_size=8).max() <= 2


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    images = np.stack([photograph(28, 28, seed)[..., 0] for seed in range(16)])
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "x-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 16]) + bytes(16))
    source = open_source(tmp_path / "x-images-idx3-ubyte")
    assert distances(source, [View(size=28)] * 2, Augment(), batches=3, batch_size=8).max() <= 2


# Order, resuming, ranks


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_the_next_ten_batches_after_a_resume_are_the_same(small: Source, backend: str) -> None:
    views, augment = MULTI_CROP[:3], Augment(solarize=0.2)
    straight = make_batches(small, views, augment, backend, stop=17)
    assert_same(make_batches(small, views, augment, backend, start=7, stop=17), straight[7:])


def test_workers_make_the_same_batches(small: Source, photos: Source) -> None:
    for source in (small, photos):
        views, augment = MULTI_CROP[:3], Augment(solarize=0.2)
        with_workers = make_batches(source, views, augment, stop=6, workers=2)
        assert_same(with_workers, make_batches(source, views, augment, stop=6))
        if source is small:
            assert_same(make_batches(source, views, augment, start=2, stop=6, workers=1), with_workers[2:])


@pytest.mark.parametrize("backend", ["cpu", "dali"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_epoch_has_each_sample_once(small: Source, backend: str, world_size: int) -> None:
    # 24 samples in batches of 6 are 4 steps; in batches of 9, 2 steps, and each epoch drops 6 other samples.
    for batch_size, steps in ((6, 4), (9, 2)):
        if batch_size % world_size:
            continue
        ranks = [
            make_batches(
                small, [View(size=8)], Augment(blur=0), backend, 0, 5 * steps, rank, world_size, batch_size=batch_size
            )
            for rank in range(world_size)
        ]
        assert [len(batches) for batches in ranks] == [5 * steps] * world_size
        whole = [joined(parts) for parts in zip(*ranks, strict=True)]
        dropped = set()
        for epoch in range(5):
            shown = torch.cat([batch.samples for batch in whole[epoch * steps : (epoch + 1) * steps]]).tolist()
            assert len(set(shown)) == len(shown) == batch_size * steps
            order = [batch_samples(24, 3, epoch * steps + step, batch_size, 0, 1)[1] for step in range(steps)]
            assert shown == np.concatenate(order).tolist()
            dropped |= set(range(24)) - set(shown)
        assert bool(dropped) == (batch_size == 9)


def test_ranks_together_make_the_same_global_batch(small: Source) -> None:
    ranks = [make_batches(small, [View(size=16)] * 2, Augment(), rank=rank, world_size=2) for rank in range(2)]
    assert_same(
        [joined(parts) for parts in zip(*ranks, strict=True)], make_batches(small, [View(size=16)] * 2, Augment())
    )


def test_later_batches_do_not_overwrite_earlier_ones(small: Source) -> None:
    # Batches share memory with DALI.
    settings = data_settings(views=(View(size=16),), batch_size=8, backend="dali")
    batches: Iterator[Batch] = train_batches(small, settings, 3, 0, 1, 0, 9, CPU)
    first = next(batches)
    before = first.views[0].clone()
    later = list(batches)
    assert torch.equal(first.views[0], before)
    assert not torch.equal(later[-1].views[0], before)


def test_a_gpu_gets_copies_that_are_complete(small: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps for a GPU, with DALI's outputs in host memory and an event that notes what is asked of it."""
    calls: list[str] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking, "waiting must not occupy a core"

        def record(self, stream: object) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    dataset = TrainDataset(small, data_settings(views=(View(size=16),) * 2, batch_size=8), 3, 0, 1)
    feed = dali._Feed(iter([reader.Reader(dataset)[0]]))
    outputs = dali._pipeline(feed, [16, 16], 8, dataset.settings, CPU).run()
    theirs = [torch.from_dlpack(view.as_tensor()) for view in outputs]
    ours = dali._to_torch(outputs, object())  # type: ignore[arg-type]
    assert calls == ["record", "synchronize"]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


# Unreadable images


def png16(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    return file.getvalue()


def test_unusual_files_match_the_cpu_backend(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = photograph(60, 90)
    whole = jpeg(picture)
    middle = len(whole) // 2
    files = {
        "cut.jpg": whole[:middle],
        "empty.jpg": b"",
        "text.jpg": b"no picture",
        "cmyk.jpg": jpeg(picture, "CMYK"),
        "16bit.png": png16(picture),
        "png.jpg": png16(picture),
        "zeros.jpg": whole[:middle] + bytes(100) + whole[middle + 100 :],
        "trailer.jpg": whole + b"\0\0",
        "one.jpg": jpeg(picture[:1, :1]),
        "wide.jpg": jpeg(np.tile(picture[:20], (1, 50, 1))),
        "exif.jpg": whole[:2] + b"\xff\xe1\x00\x10Exif\0\0brokenxx" + whole[2:],
        "good.jpg": whole,
    }
    (tmp_path / "c").mkdir()
    for name, data in files.items():
        (tmp_path / "c" / name).write_bytes(data)
    source = ImageFolder.scan(tmp_path)
    views, augment = [View(size=32)], Augment(blur=0)
    ours, theirs = (make_batches(source, views, augment, b, stop=4, batch_size=12) for b in ("dali", "cpu"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.samples.tolist() == b.samples.tolist()
        assert a.unreadable == b.unreadable
        # A thin image consists mostly of edges, and the decoders differ for the image with zeros.
        odd = {source.name(i) for i in a.samples[(a.views[0].float() - b.views[0].float()).abs().mean((1, 2, 3)) > 2]}
        assert odd <= {"c/zeros.jpg"}
    assert {source.name(i) for i, _ in ours[0].unreadable} >= {"c/cut.jpg", "c/empty.jpg", "c/text.jpg"}


def break_pipeline(root: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Return photographs, of which the sixth makes DALI's pipeline fail: its header is taken for a valid one."""
    source = ImageFolder.scan(write_photos(root, count=count))
    (root / source.name(5)).write_bytes(b"\xff\xd8\xff nothing \xff\xd9")
    header = reader.jpeg_size
    monkeypatch.setattr(reader, "jpeg_size", lambda data: (50, 50) if b"nothing" in data else header(data))
    return source


def test_an_image_that_breaks_the_pipeline_costs_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = break_pipeline(tmp_path / "photos", 12, monkeypatch)
    views, augment = [View(size=32)], Augment()
    with caplog.at_level(logging.WARNING):
        ours = make_batches(source, views, augment, stop=6, batch_size=4)
    assert sum("DALI failed" in line for line in caplog.messages) == 2  # once per epoch
    theirs = make_batches(source, views, augment, "cpu", stop=6, batch_size=4)
    for a, b in zip(ours, theirs, strict=True):
        assert a.samples.tolist() == b.samples.tolist()
        assert a.unreadable == b.unreadable
        assert (a.views[0].float() - b.views[0].float()).abs().mean() < 1


@pytest.mark.parametrize("prefetch", [1, 2])
def test_workers_end_with_their_pipeline(small: Source, monkeypatch: pytest.MonkeyPatch, prefetch: int) -> None:
    """Without the help of Python's collector, which does not run during training."""
    run, runs = dali.Pipeline.run, []

    def fails_once(self: object, stream: object) -> object:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("encountered: a damaged file")
        return run(self, stream)

    monkeypatch.setattr(dali.Pipeline, "run", fails_once)
    settings = data_settings(views=(View(size=8),), batch_size=8, workers=2, prefetch=prefetch, backend="dali")
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        batches = train_batches(small, settings, 3, 0, 1, 0, 6, CPU)
        for _ in range(3):
            next(batches)
        assert len(set(multiprocessing.active_children()) - before) == 2
        assert len(list(batches)) == 3
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_a_pipeline_that_always_fails_raises(small: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, stream: object) -> None:
        raise RuntimeError("encountered: no memory")

    monkeypatch.setattr(dali.Pipeline, "run", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        make_batches(small, [View(size=8)], Augment(), stop=30)


def test_nothing_readable() -> None:
    with pytest.raises(ValueError, match="5 images in a row cannot be read"):
        make_batches(Broken(5, good=-1), [View(size=8)], Augment(), batch_size=2)


def evaluate(
    source: Source,
    samples: list[int],
    size: int = 64,
    crops: Crops | None = None,
    center_crop: float | None = None,
    workers: int = 0,
) -> tuple[list[Batch], list[Batch]]:
    """Return the batches of an evaluation by DALI and by the CPU backend, after checking that they agree."""
    ours, theirs = (
        list(
            eval_batches(
                source, np.array(samples), size, 16, workers, crops, center_crop, data_settings(backend=backend), CPU
            )
        )
        for backend in ("dali", "cpu")
    )
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.samples.tolist() == b.samples.tolist()
        assert a.unreadable == b.unreadable
        assert a.views[0].shape == b.views[0].shape
        if len(a.samples):
            found = (a.views[0].float() - b.views[0].float()).abs().mean((1, 2, 3))
            assert found.max() <= 2
            assert found.median() <= 0.5
    return ours, theirs


FLIPPED = Crops(View(size=64), Augment(**NOTHING | {"flip": 0.5}), 5, 1)


@pytest.mark.parametrize(
    ("size", "crops", "center_crop"), [(64, None, None), (64, None, 1.0), (700, None, None), (64, FLIPPED, None)]
)
def test_evaluations_show_the_same_images(
    photos: Source, size: int, crops: Crops | None, center_crop: float | None
) -> None:
    """These are central views, also of enlarged images, and the crops of an epoch."""
    ours, _ = evaluate(photos, list(range(40)), size, crops, center_crop)
    assert [len(batch.samples) for batch in ours] == [16, 16, 8]


def test_evaluations_leave_out_unreadable_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    source = ImageFolder.scan(root)
    for i in (0, 5, 23):
        (root / source.name(i)).write_bytes(b"nothing")
    (root / source.name(9)).write_bytes(b"\xff\xd8\xff nothing \xff\xd9")
    ours, _ = evaluate(source, [*range(24), 5], workers=2)
    assert [len(batch.samples) for batch in ours] == [13, 7]
    ((nothing,), _) = evaluate(source, [5, 0])
    assert nothing.views[0].shape == (0, 64, 64, 3)
    assert evaluate(source, []) == ([], [])


def test_evaluations_go_on_after_an_image_that_breaks_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = break_pipeline(tmp_path / "photos", 40, monkeypatch)
    with caplog.at_level(logging.WARNING):
        ours, _ = evaluate(source, list(range(40)))
    assert sum("DALI failed" in line for line in caplog.messages) == 1
    assert [len(batch.samples) for batch in ours] == [15, 16, 8]


def test_automatic_evaluations_need_no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert data_settings(backend="auto").evaluation_backend_for(gpu) == "dali"
    assert data_settings(backend="auto").evaluation_backend_for(CPU) == "cpu"
    monkeypatch.setattr("data.settings.is_installed", lambda package: False)
    assert data_settings(backend="auto").evaluation_backend_for(gpu) == "cpu"
    assert data_settings(backend="dali").evaluation_backend_for(gpu) == "dali"


def test_jpeg_size() -> None:
    picture = photograph(30, 50)
    for orientation in range(1, 9):
        assert reader.jpeg_size(jpeg(picture, orientation=orientation)) == ((50, 30) if orientation > 4 else (30, 50))
    assert reader.jpeg_size(jpeg(picture, "L")) == (30, 50)
    assert reader.jpeg_size(jpeg(picture, orientation=9)) is None
    arithmetic, twelve_bits = bytearray(jpeg(picture)), bytearray(jpeg(picture))
    frame = arithmetic.index(b"\xff\xc0")
    arithmetic[frame + 1], twelve_bits[frame + 4] = 0xC9, 12
    assert reader.jpeg_size(bytes(arithmetic)) is reader.jpeg_size(bytes(twelve_bits)) is None
    for data in (b"", b"\xff\xd8\xff\xd9", jpeg(picture, "CMYK"), jpeg(picture)[:-1], png16(picture)):
        assert reader.jpeg_size(data) is None


def test_the_graph_for_a_gpu_can_be_built(small: Source) -> None:
    """It cannot run without a GPU, but each operation exists on the device that the graph requests."""
    dataset = TrainDataset(small, data_settings(views=tuple(MULTI_CROP), batch_size=8), 3, 0, 1)
    feed = dali._Feed(iter(()))
    pipeline = dali._pipeline(feed, [112, 112, 48, 72], 8, dataset.settings, torch.device("cuda", 0))
    pipeline._build_graph()
    devices: dict[str, set[str]] = {}
    for op in pipeline._ops:
        for node in op.outputs:
            devices.setdefault(op.name.strip("_").rpartition("_")[0], set()).add(node.device)
    assert devices.pop("ExternalSource") == {"cpu"}
    assert devices.pop("Split") == devices.pop("ArithmeticGenericOp") == {"cpu", "gpu"}
    assert len(devices) >= 9
    assert all(where == {"gpu"} for where in devices.values()), devices
