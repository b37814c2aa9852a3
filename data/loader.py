"""Batches of views: the other parts of `data` joined, in worker processes.

One item of the data set is one whole local batch, a pure function of the global step. So the number of workers
never changes the result, and resuming at a step is starting there.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.cpu import render, render_center
from data.index import Source, UnreadableImage
from data.order import Blocks, batch_samples, steps_per_epoch
from data.views import Augment, View, draw
from data.watch import Watched

MAX_REPLACEMENTS = 100

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as every published recipe uses
STD = (0.229, 0.224, 0.225)


@dataclass
class Batch:
    """The local batch of one step, in host memory."""

    views: list[Tensor]  # one uint8 [B, size, size, 3] RGB per view
    samples: Tensor  # int64 [B], the samples shown (after replacement)
    bad: list[tuple[int, str]]  # samples that could not be read, with the reason

    def pin_memory(self) -> "Batch":
        """For DataLoader's pinning thread."""
        return Batch([view.pin_memory() for view in self.views], self.samples.pin_memory(), self.bad)


EvalBatch = tuple[Tensor, Tensor, list[tuple[int, str]]]


@dataclass
class _TrainSteps(Dataset[Batch]):
    source: Source
    views: list[View]
    augment: Augment
    seed: int
    batch_size: int
    rank: int
    world: int
    blocks: Blocks | None = None

    def __getitem__(self, step: int) -> Batch:
        epoch, samples = batch_samples(
            len(self.source), self.seed, step, self.batch_size, self.rank, self.world, self.blocks
        )
        params = [draw(self.seed, epoch, samples, v, view, self.augment) for v, view in enumerate(self.views)]
        pixels = [np.empty((len(samples), view.size, view.size, 3), np.uint8) for view in self.views]
        shown = samples.copy()
        bad: list[tuple[int, str]] = []
        for slot, sample in enumerate(samples.tolist()):
            image, shown[slot] = _readable(self.source, sample, bad)
            for out, view, p in zip(pixels, self.views, params, strict=True):
                out[slot] = render(image, p, slot, view.size)
        return Batch([torch.from_numpy(p) for p in pixels], torch.from_numpy(shown), bad)


def _readable(source: Source, sample: int, bad: list[tuple[int, str]]) -> tuple[NDArray[np.uint8], int]:
    """The picture of `sample`, or of the next readable one, and which it is; unreadable ones are added to `bad`."""
    tries = min(MAX_REPLACEMENTS, len(source))
    for i in range(sample, sample + tries):
        i %= len(source)
        try:
            return source.image(i), i
        except UnreadableImage as error:
            bad.append((i, str(error)))
    raise ValueError(f"{tries} samples in a row cannot be read, the last is {bad[-1][1]}: check the data set")


@dataclass
class _EvalChunks(Dataset[EvalBatch]):
    source: Source
    samples: NDArray[np.int64]
    size: int
    batch_size: int

    def __getitem__(self, chunk: int) -> EvalBatch:
        images: list[NDArray[np.uint8]] = []
        read: list[int] = []
        bad: list[tuple[int, str]] = []
        for sample in self.samples[chunk * self.batch_size : (chunk + 1) * self.batch_size].tolist():
            try:
                images.append(render_center(self.source.image(sample), self.size))
                read.append(sample)
            except UnreadableImage as error:
                bad.append((sample, str(error)))
        pixels = np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8)
        return torch.from_numpy(pixels), torch.tensor(read, dtype=torch.int64), bad


def _start(dataset: Dataset, items: range, workers: int, pin_memory: bool) -> Iterator:
    """Iterates over `dataset[i] for i in items`, made by `workers` processes (0: by this one), in order."""
    context = None
    if workers:
        # Not fork: it copies the locks of every running thread (NCCL, gloo, checkpoint writer, CUDA) in whatever
        # state they are, and is not safe with some network drivers. Not spawn: each worker would import torch for
        # seconds. The fork server imports once, in a clean process, and forks from there.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data.loader"])
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            pin_memory=pin_memory,
            multiprocessing_context=context,
            generator=torch.Generator(),  # else it takes its unused seed from torch's, which a resumed run would miss
        )
    )


def train_batches(
    source: Source,
    views: list[View],
    augment: Augment,
    seed: int,
    batch_size: int,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int,
    workers: int,
    pin_memory: bool,
    blocks: Blocks | None = None,
) -> Iterator[Batch]:
    """The local batches of global steps start_step..stop_step - 1 of `rank` of `world`.

    `batch_size` is the global one. A sample that cannot be read is replaced by the next one that can, under the
    first one's view parameters, and listed in `bad`. `workers` processes, each of one thread, make whole batches;
    with 0 they are made here. Raises ValueError if the data do not fill a batch, or `world` does not divide it;
    while iterating, if 100 samples in a row, or all of fewer, cannot be read. `blocks`: of the order, None for global.
    """
    steps_per_epoch(len(source), batch_size)
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide evenly among {world} ranks")
    watched = Watched(source)
    dataset = _TrainSteps(watched, list(views), augment, seed, batch_size, rank, world, blocks)
    return watched.batches(_start(dataset, range(start_step, stop_step), workers, pin_memory))


def eval_batches(
    source: Source, samples: NDArray[np.int64], size: int, batch_size: int, workers: int
) -> Iterator[EvalBatch]:
    """The central views of `samples` (int64 [n]) in their order, in batches of at most `batch_size`.

    Yields (uint8 [B, size, size, 3], the int64 [B] samples they are of, the unreadable ones with the reason);
    unreadable samples are left out, so B may be smaller, even 0.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    watched = Watched(source)
    dataset = _EvalChunks(watched, np.asarray(samples, np.int64), size, batch_size)
    return watched.batches(_start(dataset, range(-(-len(samples) // batch_size)), workers, pin_memory=False))


@lru_cache(maxsize=8)
def _scale_and_bias(device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [1, 3, 1, 1] each: scale * (0..255) + bias has ImageNet's mean and deviation taken out.

    Cached because making them on a GPU waits for the host's copy.
    """
    std = torch.tensor(STD, device=device).view(1, 3, 1, 1)
    mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
    return 1 / (255 * std), -mean / std


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, S, S, 3] to `dtype` [B, 3, S, S], ImageNet mean and deviation taken out, on the tensor's device.

    The result is channels_last: the bytes stay in their order. Computed in fp32, then rounded to `dtype`.
    """
    scale, bias = _scale_and_bias(images.device)
    return torch.addcmul(bias, images.permute(0, 3, 1, 2), scale).to(dtype)
