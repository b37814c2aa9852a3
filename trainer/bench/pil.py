"""The data pipeline of AdCo's published code: PIL and torchvision's transforms in a DataLoader of two processes.

It is the baseline of `bench data`. Its random numbers are its own, from the same distributions as ours.
Source: https://github.com/maple-research-lab/AdCo.
"""

import io
import random
from collections.abc import Callable, Iterator

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data.normalize import MEAN, STD
from data.order import batch_samples
from data.processes import fork_server
from data.settings import DataSettings
from data.sources.base import Source
from data.views import Augment, View
from data.watch import WatchedSource

WORKERS = 2

NORMALIZE = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def batches(source: Source, data: DataSettings, device: torch.device) -> Iterator[list[Tensor]]:
    """Iterate without end over batches of normalised views on the device, float32 [B, 3, S, S] each."""
    loader = DataLoader(
        Views(WatchedSource(source), data),  # whose workers end when this process is gone
        batch_sampler=_Order(len(source), data.batch_size),
        num_workers=WORKERS,
        multiprocessing_context=fork_server([]),
        pin_memory=device.type == "cuda",
    )
    for views in loader:
        yield [view.to(device, non_blocking=True) for view in views]


def decode(source: Source, i: int) -> Image.Image:
    """Return image `i` as PIL decodes it."""
    data = source.read(i)
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(data)
    return image.convert("RGB")


class Views(Dataset[list[Tensor]]):
    """Normalised views of an image, float32 [3, S, S] each."""

    def __init__(self, source: Source, data: DataSettings) -> None:
        self.source = source
        self.transforms = [_transform(view, view.own_augment(data.augment)) for view in data.views]

    def __getitem__(self, i: int) -> list[Tensor]:
        image = decode(self.source, i)
        return [transform(image) for transform in self.transforms]

    def make(self, samples: list[int]) -> None:
        """Make the views of the samples, with the same random numbers in each call."""
        random.seed(0)
        torch.manual_seed(0)
        for i in samples:
            self[i]


class _Order:
    """Endless batches of sample indices in the order of our loader, as a DataLoader's batch sampler."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            yield batch_samples(self.samples, 0, step, self.batch_size, 0, 1)[1].tolist()
            step += 1


class _Blur:
    """The blur of MoCo v2 and AdCo: PIL's Gaussian filter with a radius drawn from `sigma`."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def _transform(view: View, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """Return torchvision's transforms in the order of the published code."""
    jitter = transforms.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, scale=view.scale, ratio=augment.ratio),
            transforms.RandomApply([jitter], p=augment.jitter),
            transforms.RandomGrayscale(p=augment.gray),
            transforms.RandomApply([_Blur(augment.blur_sigma)], p=augment.blur),
            transforms.RandomSolarize(128, p=augment.solarize),
            transforms.RandomHorizontalFlip(p=augment.flip),
            NORMALIZE,
        ]
    )
