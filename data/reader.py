"""Reads the images of a batch for DALI: encoded JPEGs and the parameters of the views, in worker processes.

The result of a batch is one array, which worker processes hand over in shared memory without a copy. The message that
announces it is shorter than the 4096 bytes that a pipe takes as a whole, so a killed worker leaves no half a message.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import EvalDataset, TrainDataset, load_or_replace
from data.cpu import center_boxes
from data.decode import decode, jpeg_frame, orientation_segments, read_orientation
from data.sources.base import Source, UnreadableImage
from data.views import LUMA, Augment, View, ViewParams, crop_boxes, draw

MAX_DALI_PIXELS = 1 << 27  # of an image that DALI decodes: 400 MB
ALIGNMENT = 64  # bytes
UNCHANGED = Augment(flip=0, jitter=0, gray=0, blur=0, solarize=0)

Item = tuple[NDArray[np.uint8], int, int]  # encoded [n] or pixels [H, W, 3]; upright height and width

# Type and shape per image of the inputs of a view; `data.dali._view` describes them.
PER_VIEW = (
    ("f4", (2,)),
    ("f4", (2,)),
    ("?", ()),
    ("?", ()),
    ("f4", (3, 3)),
    ("f4", (3, 3)),
    ("f4", (3,)),
    ("?", ()),
    ("f4", (3, 3)),
    ("f4", (3, 3)),
    ("f4", (1, 1)),
    ("?", ()),
    ("f4", ()),
    ("?", ()),
)


@dataclass
class Inputs:
    """DALI's inputs for a batch of B images.

    Attributes:
        packed: uint8 [n], all arrays one after another: the index of each image shown, int64 [B]; the shape of each
            stored image, int64 [B, 3], with zeros after the number of bytes of an encoded one; the inputs of each view;
            the stored images.
        count: Number of images.
        views: Number of views.
        unreadable: Index and error of each image that could not be read.
    """

    packed: Tensor
    count: int
    views: int
    unreadable: list[tuple[int, str]]

    def pin_memory(self) -> "Inputs":
        """Return itself: DALI copies from pageable memory."""
        return self

    def unpack(self) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]], list[NDArray]]:
        """Return the indices of the images shown, int64 [B], the stored images, and the inputs [B, …] of all views.

        Nothing is copied. Stored images are encoded, uint8 [n], or pixels, uint8 [H, W, 3].
        """
        packed, place = self.packed.numpy(), 0

        def take(kind: str, shape: tuple[int, ...]) -> NDArray:
            nonlocal place
            dtype = np.dtype(kind)
            start, place = place, place + dtype.itemsize * math.prod(shape)
            array = packed[start:place].view(dtype).reshape(shape)
            place += -place % ALIGNMENT
            return array

        shown, shapes = take("i8", (self.count,)), take("i8", (self.count, 3))
        views = [take(kind, (self.count, *shape)) for _ in range(self.views) for kind, shape in PER_VIEW]
        sizes = np.maximum(shapes, 1).prod(axis=1)
        starts = place + np.cumsum(sizes + -sizes % ALIGNMENT) - (sizes + -sizes % ALIGNMENT)
        images = [packed[start:end] for start, end in zip(starts.tolist(), (starts + sizes).tolist(), strict=True)]
        for i in np.flatnonzero(shapes[:, 1]).tolist():
            images[i] = images[i].reshape(shapes[i])
        return shown, images, views


class Reader(Dataset[Inputs]):
    """DALI's inputs for each global step."""

    def __init__(self, dataset: TrainDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Inputs:
        """Return the inputs of a step. Raises ValueError if no image can be read."""
        samples, params = self.dataset.plan(step)
        items: list[Item] = []
        shown = samples.copy()
        unreadable: list[tuple[int, str]] = []
        load = functools.partial(_load, self.dataset.source)
        for slot, sample in enumerate(samples.tolist()):
            item, shown[slot] = load_or_replace(load, len(self.dataset.source), sample, unreadable)
            items.append(item)
        sizes = _upright_sizes(items)
        return _inputs(items, shown, [(p, crop_boxes(p, *sizes)) for p in params], unreadable)


class EvalReader(Dataset[Inputs]):
    """DALI's inputs for each batch of an evaluation. An unreadable image is a black pixel, shown as index -1."""

    def __init__(self, dataset: EvalDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Inputs:
        """Return the inputs of a batch."""
        dataset = self.dataset
        samples = dataset.batch(number)
        items: list[Item] = []
        shown = samples.copy()
        unreadable: list[tuple[int, str]] = []
        for slot, sample in enumerate(samples.tolist()):
            try:
                items.append(_load(dataset.source, sample))
            except UnreadableImage as error:
                items.append((np.zeros((1, 1, 3), np.uint8), 1, 1))
                shown[slot] = -1
                unreadable.append((sample, str(error)))
        sizes = _upright_sizes(items)
        if dataset.crops:
            params = dataset.crops.draw(samples)
            boxes: NDArray = crop_boxes(params, *sizes)
        else:
            params = draw(0, 0, samples, 0, View(size=dataset.size), UNCHANGED)
            boxes = center_boxes(*sizes, dataset.size, dataset.center_crop)
        return _inputs(items, shown, [(params, boxes)], unreadable)


def _load(source: Source, i: int) -> Item:
    data = source.read(i)
    if isinstance(data, bytes):
        if size := jpeg_size(data):
            return np.frombuffer(data, np.uint8), *size
        try:
            data = decode(data)
        except ValueError as error:
            raise UnreadableImage(f"{source.name(i)}: {error}") from error
    return data, data.shape[0], data.shape[1]


def _upright_sizes(items: list[Item]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the heights and the widths of all images, int64 [B] each."""
    heights, widths = np.array([item[1:] for item in items], np.int64).T
    return heights, widths


def _inputs(
    items: list[Item],
    shown: NDArray[np.int64],
    views: list[tuple[ViewParams, NDArray]],
    unreadable: list[tuple[int, str]],
) -> Inputs:
    """Pack the images of a batch, and for each view its parameters and boxes [B, 4]."""
    shapes = np.array([(*item[0].shape, 0, 0)[:3] for item in items], np.int64)
    parameters = [array for params, boxes in views for array in _view_inputs(params, boxes)]
    arrays = [shown, shapes, *parameters, *(item[0] for item in items)]
    return Inputs(torch.from_numpy(_pack(arrays)), len(items), len(views), unreadable)


def _pack(arrays: list[NDArray]) -> NDArray[np.uint8]:
    """Return the bytes of all arrays, each at a multiple of ALIGNMENT."""
    packed = np.empty(sum(array.nbytes + -array.nbytes % ALIGNMENT for array in arrays), np.uint8)
    place = 0
    for array in arrays:
        packed[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        place += array.nbytes + -array.nbytes % ALIGNMENT
    return packed


def _view_inputs(params: ViewParams, boxes: NDArray) -> Iterator[NDArray]:
    """Yield one array [B, …] for each input of a view, with the types of PER_VIEW."""
    boxes_B4 = boxes.astype(np.float32)
    offset_B33 = params.color_offset[:, None, None] * np.broadcast_to(LUMA, (3, 3))
    sixths_B = 6 / (2 * np.pi) * params.hue
    thirds_B = np.round(sixths_B / 2).astype(np.int64)
    permutation_B33 = np.stack([np.roll(np.eye(3), third, axis=0) for third in range(3)])[thirds_B % 3]
    arrays = (
        boxes_B4[:, :2],
        boxes_B4[:, :2] + boxes_B4[:, 2:],
        params.flip,
        params.recolored,
        params.color_linear,
        offset_B33,
        np.repeat(params.color_shift[:, None], 3, axis=1),
        params.hue != 0,
        2 * permutation_B33,
        2 * (np.roll(permutation_B33, -1, axis=1) - np.roll(permutation_B33, 1, axis=1)),
        (sixths_B - 2 * thirds_B)[:, None, None],
        params.gray,
        params.sigma,
        params.solarize,
    )
    for array, (kind, _) in zip(arrays, PER_VIEW, strict=True):
        yield array.astype(kind)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return upright height and width of a JPEG that DALI decodes like the CPU backend; None for any other file.

    Such a JPEG is baseline or progressive, of 8 bits, grey or YCbCr, and not huge. It ends with the end marker, and its
    orientation is in one segment of EXIF data, if it has one. Only headers are read; the decoder finds damage between
    them.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    try:
        marker, precision, height, width = jpeg_frame(data)
        _, _, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if marker not in (0xC0, 0xC1, 0xC2) or precision != 8 or color not in ("Gray", "YCbCr"):
        return None
    if height * width > MAX_DALI_PIXELS:
        return None
    if segments := orientation_segments(data):
        orientation = read_orientation(data)
        if len(segments) > 1 or not segments[0].startswith(b"Exif") or orientation is None:
            return None
        if orientation >= 5:  # rotated by 90 degrees
            height, width = width, height
    return height, width
