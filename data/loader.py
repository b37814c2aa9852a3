"""Iterators over batches, made by worker processes or by DALI."""

import multiprocessing
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data.batch import Batch, Crops, EvalDataset, TrainDataset
from data.order import check_divides, steps_per_epoch
from data.settings import DataSettings
from data.sources.base import Source
from data.watch import WatchedSource


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
        ValueError: The images do not fill a batch, or `world_size` does not divide it. While iterating: 100 images in a
            row, or all of fewer, cannot be read.
    """
    steps_per_epoch(len(source), settings.batch_size)
    check_divides(settings.batch_size, world_size)
    watched = WatchedSource(source)
    dataset = TrainDataset(watched, settings, seed, rank, world_size)
    if settings.backend_for(device) == "dali":
        from data import dali  # the import takes a second

        return watched.batches(dali.batches(dataset, start, stop, device))
    workers, pin_memory = settings.workers_for(device), device.type == "cuda"
    return watched.batches(iterate(dataset, range(start, stop), workers, settings.prefetch, pin_memory))


def eval_batches(
    source: Source,
    samples: NDArray[np.int64],
    size: int,
    batch_size: int,
    workers: int,
    crops: Crops | None = None,
) -> Iterator[Batch]:
    """Iterate over batches with one view of each image, in host memory, without unreadable images.

    Args:
        source: The images.
        samples: Indices of the images to show, int64 [n], in this order.
        size: Size of the view in pixels.
        batch_size: Maximum number of images in a batch; unreadable ones make it smaller, even 0.
        workers: Number of worker processes; with 0, this process makes the batches.
        crops: The random crops to show; None for central views.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    watched = WatchedSource(source)
    dataset = EvalDataset(watched, np.asarray(samples, np.int64), size, batch_size, crops)
    return watched.batches(iterate(dataset, range(len(dataset)), workers, prefetch=2, pin_memory=False))


def iterate(dataset: Dataset, items: range, workers: int, prefetch: int, pin_memory: bool) -> Iterator:
    """Iterate over the items of a data set in order, made by `workers` processes, or by this one if there are 0."""
    context = None
    if workers:
        # Fork would copy the locks of running threads (NCCL, gloo, checkpoint writer, CUDA) in any state, and is not
        # safe with some network drivers. Spawn would import torch in each worker, for seconds. The fork server imports
        # once, in a clean process, and forks from there.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data.fork_server", "data.loader"])
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin_memory,
            multiprocessing_context=context,
            # DataLoader draws a seed that is not used here. From torch's generator it would take one number more in a
            # resumed run than in an uninterrupted one.
            generator=torch.Generator(),
        )
    )
