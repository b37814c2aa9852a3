"""Batches of views, and the data sets that make them with the plain CPU backend.

An item of a data set is a whole local batch. It is a pure function of its index, so the number of worker processes
never changes the result, and resuming at a step means to start there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data.cpu import render, render_center
from data.normalize import normalize
from data.order import batch_samples
from data.settings import DataSettings
from data.sources.base import Source, UnreadableImage
from data.views import Augment, View, ViewParams, draw

T = TypeVar("T")

MAX_REPLACEMENTS = 100


@dataclass
class Batch:
    """The views of one rank's images in a step."""

    views: list[Tensor]  # per view uint8 [B, S, S, 3] RGB, in host memory or on the GPU that decoded the images
    samples: Tensor  # int64 [B], indices of the images shown
    unreadable: list[tuple[int, str]]  # index and error of each image that could not be read

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory; called by the DataLoader's pinning thread."""
        return Batch([view.pin_memory() for view in self.views], self.samples.pin_memory(), self.unreadable)

    def to(self, device: torch.device) -> list[Tensor]:
        """Return the views on the device; the copy is asynchronous if they are in pinned memory."""
        return [view.to(device, non_blocking=True) for view in self.views]

    def normalized(self, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return the network's input, per view `dtype` [B, 3, S, S] on the device; see `normalize`."""
        return [normalize(view, device, dtype) for view in self.views]


@dataclass
class TrainDataset(Dataset[Batch]):
    """The local training batches of a rank; item i is the batch of global step i."""

    source: Source
    settings: DataSettings
    seed: int
    rank: int
    world_size: int

    def plan(self, step: int) -> tuple[NDArray[np.int64], list[ViewParams]]:
        """Return the images of a step, int64 [B], and for each view the parameters of these images."""
        settings = self.settings
        epoch, samples = batch_samples(
            len(self.source), self.seed, step, settings.batch_size, self.rank, self.world_size, settings.blocks
        )
        params = [
            draw(self.seed, epoch, samples, v, view, view.own_augment(settings.augment))
            for v, view in enumerate(settings.views)
        ]
        return samples, params

    def __getitem__(self, step: int) -> Batch:
        samples, params = self.plan(step)
        views = self.settings.views
        pixels = [np.empty((len(samples), view.size, view.size, 3), np.uint8) for view in views]
        shown = samples.copy()
        unreadable: list[tuple[int, str]] = []
        for slot, sample in enumerate(samples.tolist()):
            image, shown[slot] = load_or_replace(self.source.image, len(self.source), sample, unreadable)
            for out, view, p in zip(pixels, views, params, strict=True):
                out[slot] = render(image, p, slot, view.size)
        return Batch([torch.from_numpy(p) for p in pixels], torch.from_numpy(shown), unreadable)


def load_or_replace(load: Callable[[int], T], n: int, sample: int, unreadable: list[tuple[int, str]]) -> tuple[T, int]:
    """Load an image, or the next readable one.

    Args:
        load: Returns image i, or raises UnreadableImage.
        n: Number of images.
        sample: Index of the image to load.
        unreadable: Receives index and error of each unreadable image.

    Returns:
        The loaded image and its index.

    Raises:
        ValueError: 100 images in a row, or all of fewer, are unreadable.
    """
    tries = min(MAX_REPLACEMENTS, n)
    for i in range(sample, sample + tries):
        i %= n
        try:
            return load(i), i
        except UnreadableImage as error:
            unreadable.append((i, str(error)))
    raise ValueError(f"{tries} images in a row cannot be read, the last is {unreadable[-1][1]}: check the data set")


class Crops(NamedTuple):
    """The random crops that training shows in an epoch as views[0]."""

    view: View
    augment: Augment
    seed: int
    epoch: int

    def draw(self, samples: NDArray[np.int64]) -> ViewParams:
        """Return the view parameters of `samples`, int64 [B]."""
        return draw(self.seed, self.epoch, samples, 0, self.view, self.augment)


@dataclass
class EvalDataset(Dataset[Batch]):
    """Batches of one view of given images, in their order: central, or the random crops of an epoch."""

    source: Source
    samples: NDArray[np.int64]  # [n]
    size: int  # of the view, in pixels
    batch_size: int
    crops: Crops | None  # None: central views
    center_crop: float | None = None  # see `render_center`

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def batch(self, number: int) -> NDArray[np.int64]:
        """Return the samples of a batch, int64 [B]."""
        return self.samples[number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, number: int) -> Batch:
        images: list[NDArray[np.uint8]] = []
        shown: list[int] = []
        unreadable: list[tuple[int, str]] = []
        samples = self.batch(number)
        params = self.crops.draw(samples) if self.crops else None
        for i, sample in enumerate(samples.tolist()):
            try:
                image = self.source.image(sample)
                if params:
                    images.append(render(image, params, i, self.size))
                else:
                    images.append(render_center(image, self.size, self.center_crop))
                shown.append(sample)
            except UnreadableImage as error:
                unreadable.append((sample, str(error)))
        pixels = np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8)
        return Batch([torch.from_numpy(pixels)], torch.tensor(shown, dtype=torch.int64), unreadable)
