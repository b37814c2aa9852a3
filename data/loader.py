"""Batches of views: the other parts of `data` joined, in worker processes.

One item of the data set is one whole local batch, a pure function of the global step. So the number of workers
never changes the result, and resuming at a step is starting there.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.cpu import render, render_center
from data.order import Blocks, batch_samples, steps_per_epoch
from data.sources.open import Source, UnreadableImage
from data.views import Augment, View, ViewParams, draw
from data.watch import Watched

T = TypeVar("T")

MAX_REPLACEMENTS = 100

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as every published recipe uses
STD = (0.229, 0.224, 0.225)

_SERIAL = 32767  # elements: torch uses several threads from 32,768 on (at::internal::GRAIN_SIZE)


class Decoder(BaseModel):
    """Of the DALI backend on a GPU, where JPEGs are decoded there. Ignored elsewhere.

    hw_decoder_load: share of the pictures that the hardware decoder takes (A100 and later), the others go to the CUDA
    cores; the best share depends on `data.workers`. device_padding and host_padding: bytes of memory per thread that
    nvJPEG takes at the start, so that it need not grow later; width and height: the largest picture the hardware
    decoder prepares for, in pixels, 0 for none. NVIDIA's examples give 211025920, 140544512, 5980 and 6430 for
    ImageNet: no allocation after the first step, for 0.2 GB of the GPU's memory a thread.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hw_decoder_load: float = Field(0.65, ge=0, le=1)
    device_padding: int = Field(16 << 20, ge=0)
    host_padding: int = Field(8 << 20, ge=0)
    width: int = Field(0, ge=0)
    height: int = Field(0, ge=0)


CPU, DEFAULT_DECODER = torch.device("cpu"), Decoder()


@dataclass
class Batch:
    """The local batch of one step, in host memory, or on the GPU that decoded it."""

    views: list[Tensor]  # one uint8 [B, size, size, 3] RGB per view
    samples: Tensor  # int64 [B], the samples shown (after replacement)
    bad: list[tuple[int, str]]  # samples that could not be read, with the reason

    def pin_memory(self) -> "Batch":
        """For DataLoader's pinning thread."""
        return Batch([view.pin_memory() for view in self.views], self.samples.pin_memory(), self.bad)


EvalBatch = tuple[Tensor, Tensor, list[tuple[int, str]]]


@dataclass
class Steps(Dataset[Batch]):
    """The local batches of `rank` by global step, made by the plain CPU backend; `batch_size` is the global one."""

    source: Source
    views: list[View]
    augment: Augment
    seed: int
    batch_size: int
    rank: int
    world_size: int
    blocks: Blocks | None = None

    def plan(self, step: int) -> tuple[NDArray[np.int64], list[ViewParams]]:
        """The samples of a step, int64 [B], and the parameters of each of their views."""
        epoch, samples = batch_samples(
            len(self.source), self.seed, step, self.batch_size, self.rank, self.world_size, self.blocks
        )
        return samples, [draw(self.seed, epoch, samples, v, view, self.augment) for v, view in enumerate(self.views)]

    def __getitem__(self, step: int) -> Batch:
        samples, params = self.plan(step)
        pixels = [np.empty((len(samples), view.size, view.size, 3), np.uint8) for view in self.views]
        shown = samples.copy()
        bad: list[tuple[int, str]] = []
        for slot, sample in enumerate(samples.tolist()):
            image, shown[slot] = readable(self.source.image, len(self.source), sample, bad)
            for out, view, p in zip(pixels, self.views, params, strict=True):
                out[slot] = render(image, p, slot, view.size)
        return Batch([torch.from_numpy(p) for p in pixels], torch.from_numpy(shown), bad)


def readable(load: Callable[[int], T], n: int, sample: int, bad: list[tuple[int, str]]) -> tuple[T, int]:
    """`load(i)` of `sample`, or of the next of the `n` that can be read, and i; unreadable ones are added to `bad`."""
    tries = min(MAX_REPLACEMENTS, n)
    for i in range(sample, sample + tries):
        i %= n
        try:
            return load(i), i
        except UnreadableImage as error:
            bad.append((i, str(error)))
    raise ValueError(f"{tries} samples in a row cannot be read, the last is {bad[-1][1]}: check the data set")


class Crops(NamedTuple):
    """The random views that `train_batches` shows in an epoch with a seed, as views[0]."""

    view: View
    augment: Augment
    seed: int
    epoch: int

    def draw(self, samples: NDArray[np.int64]) -> ViewParams:
        return draw(self.seed, self.epoch, samples, 0, self.view, self.augment)


@dataclass
class _EvalChunks(Dataset[EvalBatch]):
    source: Source
    samples: NDArray[np.int64]
    size: int
    batch_size: int
    crops: Crops | None

    def __getitem__(self, chunk: int) -> EvalBatch:
        images: list[NDArray[np.uint8]] = []
        read: list[int] = []
        bad: list[tuple[int, str]] = []
        samples = self.samples[chunk * self.batch_size : (chunk + 1) * self.batch_size]
        params = self.crops.draw(samples) if self.crops else None
        for i, sample in enumerate(samples.tolist()):
            try:
                image = self.source.image(sample)
                images.append(render(image, params, i, self.size) if params else render_center(image, self.size))
                read.append(sample)
            except UnreadableImage as error:
                bad.append((sample, str(error)))
        pixels = np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8)
        return torch.from_numpy(pixels), torch.tensor(read, dtype=torch.int64), bad


def _start(dataset: Dataset, items: range, workers: int, prefetch: int, pin_memory: bool) -> Iterator:
    """Iterates over `dataset[i] for i in items`, made by `workers` processes (0: by this one), in order."""
    context = None
    if workers:
        # Not fork: it copies the locks of every running thread (NCCL, gloo, checkpoint writer, CUDA) in whatever
        # state they are, and is not safe with some network drivers. Not spawn: each worker would import torch for
        # seconds. The fork server imports once, in a clean process, and forks from there.
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
            generator=torch.Generator(),  # else it takes its unused seed from torch's, which a resumed run would miss
        )
    )


def default_backend(device: torch.device) -> Literal["cpu", "dali"]:
    """What `data.backend: auto` stands for; docs/data-backends.md has the measurements."""
    return "dali" if device.type == "cuda" else "cpu"


def default_workers(device: torch.device, ranks: int) -> int:
    """Worker processes of each of `ranks` ranks of a machine.

    With a GPU, the cores that the ranks' own threads leave, up to 16; without one, the network uses all cores and one
    process keeps ahead of it.
    """
    share = len(os.sched_getaffinity(0)) // ranks
    return min(16, max(1, share - 1)) if device.type == "cuda" else 1


def train_batches(
    source: Source,
    views: list[View],
    augment: Augment,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    workers: int,
    device: torch.device = CPU,
    backend: Literal["cpu", "dali"] = "cpu",
    prefetch: int = 2,
    decoder: Decoder = DEFAULT_DECODER,
    blocks: Blocks | None = None,
) -> Iterator[Batch]:
    """The local batches of global steps start_step..stop_step - 1 of `rank` of `world`.

    `batch_size` is the global one. A sample that cannot be read is replaced by the next one that can, under the
    first one's view parameters, and listed in `bad`. `workers` processes, each of one thread, make whole batches,
    `prefetch` of them ahead; with 0 they are made here. The CPU backend's batches are in host memory, pinned if
    `device` is a GPU; DALI's are on `device`. Raises ValueError if the data do not fill a batch, or `world` does not
    divide it; while iterating, if 100 samples in a row, or all of fewer, cannot be read. `blocks`: of the order,
    None for global.
    """
    steps_per_epoch(len(source), batch_size)
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} does not divide evenly among {world_size} ranks")
    watched = Watched(source)
    steps = Steps(watched, list(views), augment, seed, batch_size, rank, world_size, blocks)
    if backend == "dali":
        from data import dali  # takes a second

        return watched.batches(dali.batches(steps, start_step, stop_step, workers, prefetch, device, decoder))
    return watched.batches(
        _start(steps, range(start_step, stop_step), workers, prefetch, pin_memory=device.type == "cuda")
    )


def eval_batches(
    source: Source,
    samples: NDArray[np.int64],
    size: int,
    batch_size: int,
    workers: int,
    crops: Crops | None = None,
) -> Iterator[EvalBatch]:
    """The central views of `samples` (int64 [n]), or random ones, in their order, in batches of at most `batch_size`.

    Yields (uint8 [B, size, size, 3], the int64 [B] samples they are of, the unreadable ones with the reason);
    unreadable samples are left out, so B may be smaller, even 0.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    watched = Watched(source)
    dataset = _EvalChunks(watched, np.asarray(samples, np.int64), size, batch_size, crops)
    return watched.batches(_start(dataset, range(-(-len(samples) // batch_size)), workers, 2, pin_memory=False))


@lru_cache(maxsize=64)
def _scale_and_bias(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """float32 [width * 3] each, for a row of pixels: scale * (0..255) + bias takes out ImageNet's mean and deviation.

    Cached because making them on a GPU waits for the host's copy.
    """
    std, mean = torch.tensor(STD, device=device), torch.tensor(MEAN, device=device)
    return (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)


def normalize(images: Tensor, dtype: torch.dtype, whole: bool | None = None) -> Tensor:
    """uint8 [B, S, S, 3] to `dtype` [B, 3, S, S], ImageNet mean and deviation taken out, on the tensor's device.

    The result is channels_last: the bytes stay in their order. Computed in fp32, then rounded to `dtype`.
    whole: by one operation, as suits a GPU; None: on a GPU.
    """
    _, height, width, _ = images.shape
    scale, bias = _scale_and_bias(images.device, width)
    rows = rearrange(images, "b h w c -> (b h) (w c)")
    if images.is_cuda if whole is None else whole:
        out = torch.addcmul(bias, rows, scale)
    else:
        # Two types in one operation are ten times slower: convert, then in place, in parts that stay in the cache and
        # are too small for torch to share among threads. Those would spin between the operations, where workers decode.
        out = torch.empty(rows.shape, dtype=torch.float32)
        part = max(1, _SERIAL // rows.shape[1])
        for to, raw in zip(out.split(part), rows.split(part), strict=True):
            torch.addcmul(bias, to.copy_(raw), scale, out=to)
    return rearrange(out, "(b h) (w c) -> b c h w", h=height, w=width).to(dtype)
