"""The DALI backend: a DALI pipeline decodes images and applies `ViewParams`, on a GPU or, without one, on the CPU.

    step -> `data.reader` (worker processes): samples, encoded bytes, boxes, matrices -> external_source
         -> decode once
         -> per view: crop and resize, flip, colour matrix, hue, grayscale, blur, solarize -> uint8 [B, S, S, 3]

DALI draws no random numbers. `data.views` computes the view parameters as a pure function of the step, so there is no
state to save, and the number of workers does not matter. Views are uint8 and channels-last, as with the CPU backend:
`data.normalize` converts them in one pass on the GPU, and DALI's queues hold a quarter of the bytes of float images.

The workers are those of the CPU backend's loader, not DALI's own: these end the training process by a bus error, or let
it wait forever, when shared memory is full or a worker is killed.

The views equal those of `data.cpu` up to the decoder and rounding; docs/data-backends.md has the differences. On a GPU,
nvJPEG decodes JPEGs with libjpeg-turbo's chroma upsampling. The reader decodes all images that DALI might decode
differently from the CPU backend (anything but complete grey or YCbCr JPEGs). If an image still makes the pipeline fail,
the CPU backend makes the batch of that step, and a new pipeline continues after it.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from data import shared_memory
from data.ahead import run_ahead
from data.batch import Batch, EvalDataset, TrainDataset
from data.loader import iterate
from data.reader import PER_VIEW, EvalReader, Inputs, Reader
from data.settings import DataSettings, DecoderSettings
from data.views import LUMA

log = logging.getLogger(__name__)

SOLARIZED = [min(value, 255 - value) for value in range(256)]
MAX_FAILURES = 10  # in a row, before an error is attributed to DALI instead of an image


@pipeline_def(enable_conditionals=True)
def _graph(feed: Callable[[], list], sizes: list[int], device: str, decoder: DecoderSettings) -> tuple[DataNode, ...]:
    """Return per view uint8 [S, S, 3]. `feed` returns the inputs of a batch, and keeps them until it is complete."""
    jpeg, pixels, encoded, *inputs = fn.external_source(
        source=feed,
        num_outputs=3 + len(PER_VIEW) * len(sizes),
        layout=("", "HWC", ""),
        no_copy=True,
    )
    if encoded:
        if device == "gpu":
            image = fn.decoders.image(
                jpeg,
                device="mixed",
                jpeg_fancy_upsampling=True,
                hw_decoder_load=decoder.hw_decoder_load,
                device_memory_padding=decoder.device_padding,
                host_memory_padding=decoder.host_padding,
                preallocate_width_hint=decoder.width,
                preallocate_height_hint=decoder.height,
            )
        else:
            image = fn.decoders.image(jpeg, device="cpu")
    else:
        if device == "gpu":
            image = pixels.gpu()
        else:
            image = pixels
    n = len(PER_VIEW)
    return tuple(_view(image, size, *inputs[n * v : n * (v + 1)]) for v, size in enumerate(sizes))


def _view(
    image: DataNode,
    size: int,
    start: DataNode,
    end: DataNode,
    flip: DataNode,
    recolored: DataNode,
    linear: DataNode,
    offset: DataNode,
    shift: DataNode,
    rotated: DataNode,
    double: DataNode,
    slope: DataNode,
    turn: DataNode,
    gray: DataNode,
    sigma: DataNode,
    solarize: DataNode,
) -> DataNode:
    """Apply the parameters of one view, which are in host memory.

    Args:
        image: uint8 [H, W, 3].
        size: Height and width of the view.
        start: First corner (y, x) of the crop.
        end: Opposite corner (y, x) of the crop.
        flip: Whether to flip horizontally.
        recolored: Whether to apply `linear`, `offset` and `shift`.
        linear: [3, 3]; the colour becomes `linear @ rgb + offset @ mean + shift`, with the mean colour of the resized
            crop.
        offset: [3, 3], see `linear`. It multiplies the mean in a transform of its own: the mean is on the GPU, and as
            an argument of the first transform it would have to be in host memory, for which the host would wait.
        shift: [3], see `linear`.
        rotated: Whether to change the hue.
        double: See `_rotate_hue`, as for `slope` and `turn`.
        slope: See `double`.
        turn: See `double`.
        gray: Whether to take the luma.
        sigma: Standard deviation of the blur in pixels; 0 for no blur.
        solarize: Whether to solarize.

    Returns:
        uint8 [size, size, 3].
    """
    view = fn.resize(
        image, size=[size, size], roi_start=start, roi_end=end, interp_type=types.INTERP_LINEAR, antialias=True
    )
    if flip:
        view = fn.flip(view, horizontal=1)
    if recolored:
        mean = fn.reshape(fn.reductions.mean(view, axes=[0, 1], keep_dims=True), layout="HWC")
        color = fn.coord_transform(view, M=linear, T=shift) + fn.coord_transform(mean, M=offset)
        view = fn.cast(dali_math.clamp(color, 0.0, 255.0), dtype=types.UINT8)
    if rotated:
        view = _rotate_hue(view, double, slope, turn)
    if gray:
        view = fn.coord_transform(view, M=3 * LUMA.tolist(), dtype=types.UINT8)
    if sigma > 0:
        view = fn.gaussian_blur(view, sigma=sigma)  # with a window of 2 ceil(3 sigma) + 1
    if solarize:
        view = fn.lookup_table(view, keys=list(range(256)), values=SOLARIZED, dtype=types.UINT8)
    return view


class _Feed:
    """The callable of the external source: hands the arrays of the next batch to DALI without a copy.

    It keeps each batch until `complete` is called, because DALI reads the arrays later than it takes them.
    """

    def __init__(self, batches: Iterator[Inputs]) -> None:
        self.batches = batches
        self.pending: deque[tuple[Inputs, NDArray[np.int64]]] = deque()

    def __call__(self) -> list[list[NDArray] | NDArray]:
        """Return the encoded images (uint8 [n], or one byte), the pixels, which of the two is valid, and all views."""
        batch = next(self.batches)
        shown, images, views = batch.unpack()
        self.pending.append((batch, shown))
        encoded = np.array([image.ndim == 1 for image in images])
        return [_or_placeholder(images, encoded, (1,)), _or_placeholder(images, ~encoded, (1, 1, 3)), encoded, *views]

    def end(self) -> None:
        """End the worker processes. DALI's operators keep the feed in cycles until Python's collector runs."""
        self.batches = iter(())

    def complete(self) -> tuple[Tensor, list[tuple[int, str]]]:
        """Release the oldest batch; return the indices of the images shown, int64 [B], and its unreadable images.

        An index is -1 where no image is shown, see `data.reader.EvalReader`.
        """
        batch, shown = self.pending.popleft()
        return torch.from_numpy(shown.copy()), batch.unreadable


def _rotate_hue(view: DataNode, double: DataNode, slope: DataNode, turn: DataNode) -> DataNode:
    """Turn the hue in HSV, without HSV: DALI has no such operator, and each of its arithmetic operators is a pass.

    Thirds of a turn permute the channels, and at most a sixth remains. In HSV, a channel x of a pixel with minimum m
    and chroma c is m + clamp(t, 0, c). Here t is a triangular wave of the hue, whose slope is c or -c for each sixth of
    a turn. From the pixel's channels, t = 2 x - m - median, and t falls where the next of the channels RGB is not below
    the one before. A rotation moves t along its slope. At its peak of 2 c and its trough of -c the wave should turn
    back, but there the clamp gives the same.

    Args:
        view: uint8 [S, S, 3].
        double: [3, 3], twice the permutation of the channels.
        slope: [3, 3], twice the differences of the next and the previous channel after the permutation.
        turn: [1, 1], the remaining angle in sixths of a turn.
    """
    red, green, blue = (view[:, :, c : c + 1] for c in range(3))
    low, high = dali_math.min(red, green), dali_math.max(red, green)
    minimum, median = dali_math.min(low, blue), dali_math.clamp(blue, low, high)
    chroma = dali_math.max(high, blue) - minimum
    falls = dali_math.clamp(fn.coord_transform(view, M=slope, T=1.0), -1, 1)  # 1 or -1: channels are whole numbers
    t = fn.coord_transform(view, M=double) - (fn.cast(median, dtype=types.FLOAT) + minimum)
    t = t - falls * fn.coord_transform(chroma, M=turn)
    return fn.cast(dali_math.clamp(t, 0, chroma) + minimum, dtype=types.UINT8)


def _or_placeholder(
    images: list[NDArray[np.uint8]], valid: NDArray[np.bool_], shape: tuple[int, ...]
) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
    """Return the images, with zeros of `shape` for those that are not valid: one array if none is."""
    if not valid.any():
        return np.zeros((len(images), *shape), np.uint8)
    nothing = np.zeros(shape, np.uint8)
    return [image if ok else nothing for image, ok in zip(images, valid.tolist(), strict=True)]


def _pipeline(
    feed: Callable[[], list], sizes: list[int], batch_size: int, settings: DataSettings, device: torch.device
) -> Pipeline:
    on_gpu = device.type == "cuda"
    return _graph(
        feed,
        sizes,
        "gpu" if on_gpu else "cpu",
        settings.decoder,
        batch_size=batch_size,
        num_threads=max(1, settings.workers_for(device)),
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=settings.prefetch,
    )


def batches(
    dataset: TrainDataset | EvalDataset, settings: DataSettings, start: int, stop: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the items `start` to `stop` - 1 of a data set, with views on the device.

    `settings.workers` processes read, as many threads decode, and `settings.prefetch` batches are made ahead. With
    workers, a thread feeds DALI, so that the thread that launches the training step never does.

    Raises:
        ValueError: See `data.loader.train_batches`.
        RuntimeError: DALI failed ten steps in a row.
    """
    made = make_batches(dataset, settings, start, stop, device)
    for batch in run_ahead(made) if settings.workers_for(device) else made:
        for view in batch.views:
            if view.is_cuda:  # another stream allocated it, and its memory may be reused only after this stream's work
                view.record_stream(torch.cuda.current_stream(device))
        yield batch


def make_batches(
    dataset: TrainDataset | EvalDataset, settings: DataSettings, start: int, stop: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield batches whose views are complete and in torch's memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # this may be a thread of its own, which would open a context on GPU 0
    if isinstance(dataset, TrainDataset):
        reader: Reader | EvalReader = Reader(dataset)
        sizes, batch_size = [view.size for view in settings.views], settings.batch_size // dataset.world_size
    else:
        reader, sizes, batch_size = EvalReader(dataset), [dataset.size], dataset.batch_size
    step, failed, workers = start, 0, settings.workers_for(device)
    prefetch = shared_memory.dali_prefetch(settings, workers)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    while step < stop:
        feed = _Feed(iterate(reader, range(step, stop), workers, prefetch, pin_memory=False))
        pipeline = _pipeline(feed, sizes, batch_size, settings, device)
        try:
            pipeline.build()
            while step < stop:
                try:
                    outputs = pipeline.run(stream)
                except RuntimeError as error:
                    failed += 1
                    if failed == MAX_FAILURES:
                        raise
                    log.warning("batch %d: DALI failed, so the CPU backend makes it: %s", step, _reason(error))
                    break
                failed = 0
                views = _to_torch(outputs, stream)
                del outputs
                yield _without_missing(Batch(views, *feed.complete()), stream)
                del views
                step += 1
            else:
                return
        finally:
            del pipeline
            feed.end()
        yield dataset[step]
        step += 1


def _without_missing(batch: Batch, stream: torch.cuda.Stream | None) -> Batch:
    """Leave out the views of images that could not be read. The views are complete, before and after."""
    is_shown = batch.samples >= 0
    if is_shown.all():
        return batch
    # On the stream of `_to_torch`, which uses the memory of the whole views again for the next batch.
    with torch.cuda.stream(stream) if stream else nullcontext():
        views = [view[is_shown.to(view.device)] for view in batch.views]
    if stream:
        stream.synchronize()
    return Batch(views, batch.samples[is_shown], batch.unreadable)


def _to_torch(outputs: tuple, stream: torch.cuda.Stream | None) -> list[Tensor]:
    """Return DALI's outputs as tensors, which on a GPU are copies that are complete.

    DALI reuses the memory of its outputs as soon as they are released, and does not know which streams still read them.
    On a GPU they are therefore copied, for 77 MB a tenth of a millisecond, and released when the copy has ended: only
    this thread waits for that. On a CPU, the tensors keep DALI's memory.
    """
    if stream is None:
        return [torch.from_dlpack(view.as_tensor()) for view in outputs]
    with torch.cuda.stream(stream):
        views = [torch.from_dlpack(view.as_tensor()).clone() for view in outputs]
        copied = torch.cuda.Event(blocking=True)
        copied.record(stream)
    copied.synchronize()
    return views


def _reason(error: Exception) -> str:
    """Return the part of DALI's message that names the cause."""
    text = str(error)
    return " ".join((text.partition("encountered:")[2] or text).partition("Current pipeline")[0].split())
