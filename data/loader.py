"""Iterators over batches, made by worker processes or by DALI."""

import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data import shared_memory
from data.batch import Batch, Crops, EvalDataset, TrainDataset
from data.extras import optional_import
from data.order import check_divides, steps_per_epoch
from data.processes import fork_server
from data.settings import DataSettings
from data.sources.base import Source
from data.watch import WatchedSource

CPU = torch.device("cpu")


def train_batches(
    source: Source,
    settings: DataSettings,
    seed: int,
    rank: int,
    world_size: int,
    start: int,
    stop: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Iterate over a rank's batches of the global steps `start` to `stop` - 1.

    An unreadable image is replaced by the next readable one, which gets the view parameters of the unreadable one. The
    CPU backend's views are in host memory, pinned if `device` is a GPU; DALI's are on `device`.

    Args:
        source: The training images.
        settings: Batch size, views and backend.
        seed: Seed of the order and of the view parameters.
        rank: This rank.
        world_size: Number of ranks, which share each global batch.
        start: First global step, from 0.
        stop: Global step after the last one.
        device: Where the batches will be used.

    Raises:
        ValueError: The images do not fill a batch, `world_size` does not divide it, or the batches do not fit into
            shared memory. While iterating: 100 images in a row, or all of fewer, cannot be read, or a worker has died.
    """
    steps_per_epoch(len(source), settings.batch_size)
    check_divides(settings.batch_size, world_size)
    shared_memory.check(shared_memory.training_bytes(source, settings, device, world_size))
    watched = WatchedSource(source)
    dataset = TrainDataset(watched, settings, seed, rank, world_size)
    if settings.backend_for(device) == "dali":
        with optional_import("dali", f"data.backend={settings.backend}"):
            from data import dali  # the import takes a second

        return watched.batches(dali.batches(dataset, settings, start, stop, device))
    workers, pin_memory = settings.workers_for(device), device.type == "cuda"
    return watched.batches(iterate(dataset, range(start, stop), workers, settings.prefetch, pin_memory))


def eval_batches(
    source: Source,
    samples: NDArray[np.int64],
    size: int,
    batch_size: int,
    workers: int,
    crops: Crops | None = None,
    center_crop: float | None = None,
    settings: DataSettings | None = None,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Iterate over batches with one view of each image, without unreadable images.

    The CPU backend's views are in host memory, DALI's on `device`.

    Args:
        source: The images.
        samples: Indices of the images to show, int64 [n], in this order.
        size: Size of the view in pixels.
        batch_size: Maximum number of images in a batch; unreadable ones make it smaller, even 0.
        workers: Number of worker processes; with 0, this process makes the batches.
        crops: The random crops to show; None for central views.
        center_crop: Share of the shorter side that central views show, see `render_center`.
        settings: Where given, their backend for `device` makes the views, else the CPU backend.
        device: Where the batches will be used.

    Raises:
        ValueError: `batch_size` is below 1, or the batches do not fit into shared memory. While iterating: a worker has
            died.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    watched = WatchedSource(source)
    dataset = EvalDataset(watched, np.asarray(samples, np.int64), size, batch_size, crops, center_crop)
    if settings and settings.evaluation_backend_for(device) == "dali":
        with optional_import("dali", f"data.backend={settings.backend}"):
            from data import dali

        settings = settings.model_copy(update={"workers": workers})
        shared_memory.check(shared_memory.dali_bytes(source, min(batch_size, len(samples)), settings, workers))
        return watched.batches(dali.batches(dataset, settings, 0, len(dataset), device))
    shared_memory.check(shared_memory.evaluation_bytes(size, min(batch_size, len(samples)), workers))
    batches = iterate(dataset, range(len(dataset)), workers, shared_memory.EVALUATION_PREFETCH, pin_memory=False)
    return watched.batches(batches)


def iterate(dataset: Dataset, items: range, workers: int, prefetch: int, pin_memory: bool) -> Iterator:
    """Iterate over the items of a data set in order, made by `workers` processes, or by this one if there are 0.

    Raises:
        ValueError: Shared memory is full, or (while iterating) a worker has died; the message has the reason.
    """
    if not workers:
        made = map(dataset.__getitem__, items)
        return (item.pin_memory() for item in made) if pin_memory else made
    loader = DataLoader(
        _PickledItems(dataset),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        multiprocessing_context=fork_server(["data.fork_server", "data.loader", "data.reader"]),
        worker_init_fn=_set_up_worker,
        # DataLoader draws a seed that is not used here. From torch's generator it would take one number more in a
        # resumed run than in an uninterrupted one.
        generator=torch.Generator(),
    )
    try:
        return _with_reasons(iter(loader))
    except (RuntimeError, OSError) as error:
        if shared_memory.is_shortage(error):
            raise ValueError(f"worker processes cannot start: {error}; {shared_memory.CURE}") from error
        raise


def _with_reasons(batches: Any) -> Iterator:
    """Yield the items of DataLoader's iterator. Raises ValueError with the reason if a worker has died."""
    while True:
        try:
            item = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            codes = [code for worker in batches._workers if (code := worker.exitcode) is not None]
            if not codes:
                raise
            reason = shared_memory.describe_exit(min(codes))  # a signal rather than the exits that follow it
            raise ValueError(f"a data worker died: {reason}") from error
        yield item


@dataclass
class _PickledItems(Dataset):
    """Items that are pickled in a worker's main thread, where an error becomes the trainer's error.

    DataLoader pickles in a thread of the worker's queue. If that fails, for example because shared memory is full, the
    thread drops the item, and the trainer would wait for it indefinitely.
    """

    dataset: Dataset

    def __getitem__(self, i: int) -> "_Pickled":
        item = self.dataset[i]
        try:
            return _Pickled(bytes(ForkingPickler.dumps(item)))
        except (RuntimeError, OSError) as error:
            if shared_memory.is_shortage(error):
                raise ValueError(f"a worker cannot send its batch: {error}; {shared_memory.CURE}") from error
            raise


@dataclass
class _Pickled:
    """A pickled item, which its receiver gets unpickled."""

    data: bytes

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.data,)


def _set_up_worker(number: int) -> None:
    """End this worker, which the trainer notices, if the thread of its queue cannot send something."""

    def fail(error: BaseException, item: object) -> None:
        print(f"a data worker cannot send {type(item).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(fail)  # type: ignore[attr-defined]
