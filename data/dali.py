"""The DALI backend: a DALI pipeline decodes images and applies `ViewParams`, on a GPU or, without one, on the CPU.

    step -> Reader (worker processes): samples, encoded bytes, boxes, matrices -> external_source
         -> decode once -> per view: crop and resize, flip, colour matrix, blur, solarize -> uint8 [B, S, S, 3]

DALI draws no random numbers. `data.views` computes the view parameters as a pure function of the step, so there is no
state to save, and the number of workers does not matter. Views are uint8 and channels-last, as with the CPU backend:
`data.normalize` converts them in one pass on the GPU, and DALI's queues hold a quarter of the bytes of float images.

The views equal those of `data.cpu` up to the decoder and rounding; docs/data-backends.md has the differences. On a GPU,
nvJPEG decodes JPEGs with libjpeg-turbo's chroma upsampling. The reader decodes all images that DALI might decode
differently from the CPU backend (anything but complete grey or YCbCr JPEGs). If an image still makes the pipeline fail,
the CPU backend makes the batch of that step, and a new pipeline continues after it.
"""

import io
import json
import logging
import multiprocessing
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from PIL import ExifTags, Image

from data.batch import Batch, TrainDataset, load_or_replace
from data.decode import decode
from data.settings import DecoderSettings
from data.sources.base import UnreadableImage
from data.views import LUMA, ViewParams, crop_boxes

log = logging.getLogger(__name__)

COMMON_LAYOUTS = ("", "HWC", "", "", "")  # of the outputs of `Reader` that do not belong to a view
PER_VIEW = 8  # inputs of `_view` after the image and the size
SOLARIZED = [min(value, 255 - value) for value in range(256)]
MAX_DALI_PIXELS = 1 << 27  # of an image that DALI decodes: 400 MB
MAX_FAILURES = 10  # in a row, before an error is attributed to DALI instead of an image

Item = tuple[NDArray[np.uint8], int, int]  # encoded [n] or pixels [H, W, 3]; upright height and width


class Reader:
    """The callable of the external source: maps the number of a batch, from 0 at step `start`, to DALI's inputs.

    For each of the B images it returns the JPEG (uint8 [n], or one byte), the pixels (uint8 [H, W, 3], or one), which
    of the two is valid (bool), the index of the image shown (int64), a note (uint8 [n], JSON about unreadable images in
    the first, one byte in the others), and for each view the inputs of `_view`.
    """

    def __init__(self, dataset: TrainDataset, start: int, stop: int) -> None:
        self.dataset, self.start, self.stop = dataset, start, stop

    def __call__(self, number: int) -> list[list[NDArray] | NDArray]:
        """Return the inputs of a batch; raise StopIteration at step `stop`."""
        step = self.start + number
        if step >= self.stop:
            raise StopIteration
        samples, params = self.dataset.plan(step)
        items, shown, note = self._read(samples)
        encoded = [data.ndim == 1 for data, _, _ in items]
        none, no_pixels = np.zeros(1, np.uint8), np.zeros((1, 1, 3), np.uint8)
        notes = [np.frombuffer(note, np.uint8)] + [none] * (len(samples) - 1)
        heights, widths = np.array([item[1:] for item in items], np.int64).T
        return [
            [item[0] if jpeg else none for item, jpeg in zip(items, encoded, strict=True)],
            [no_pixels if jpeg else item[0] for item, jpeg in zip(items, encoded, strict=True)],
            np.array(encoded),
            shown,
            notes,
            *(array for p in params for array in _view_inputs(p, crop_boxes(p, heights, widths))),
        ]

    def _read(self, samples: NDArray[np.int64]) -> tuple[list[Item], NDArray[np.int64], bytes]:
        """Return the items, the indices of the images shown, and the note.

        The note also transports an error, because DALI would turn an exception into the text of a traceback.
        """
        items, shown, error = [], samples.copy(), ""
        unreadable: list[tuple[int, str]] = []
        try:
            for slot, sample in enumerate(samples.tolist()):
                item, shown[slot] = load_or_replace(self._load, len(self.dataset.source), sample, unreadable)
                items.append(item)
        except ValueError as failure:
            error = str(failure)
            items = [(np.zeros((1, 1, 3), np.uint8), 1, 1)] * len(samples)
        return items, shown, json.dumps([unreadable, error]).encode()

    def _load(self, i: int) -> Item:
        data = self.dataset.source.read(i)
        if isinstance(data, bytes):
            if size := jpeg_size(data):
                return np.frombuffer(data, np.uint8), *size
            try:
                data = decode(data)
            except ValueError as error:
                raise UnreadableImage(f"{self.dataset.source.name(i)}: {error}") from error
        return np.ascontiguousarray(data), data.shape[0], data.shape[1]


def _view_inputs(params: ViewParams, boxes: NDArray[np.int64]) -> list[NDArray]:
    """Return one array [B, ...] for each input of `_view` after the image and the size."""
    boxes_B4 = boxes.astype(np.float32)
    offset_B33 = params.color_offset[:, None, None] * np.broadcast_to(LUMA, (3, 3))
    return [
        boxes_B4[:, :2].copy(),
        boxes_B4[:, :2] + boxes_B4[:, 2:],
        params.flip,
        params.recolored,
        params.color_linear.astype(np.float32),
        offset_B33.astype(np.float32),
        params.sigma.astype(np.float32),
        params.solarize,
    ]


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return upright height and width of a JPEG that DALI decodes like the CPU backend; None for any other file.

    Such a JPEG is grey or YCbCr and not huge, it ends with the end marker, and Pillow can read its EXIF orientation, if
    it has one. Only headers are read; the decoder finds damage between them.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color not in ("Gray", "YCbCr") or height * width > MAX_DALI_PIXELS:
        return None
    if data.find(b"Exif\0\0", 0, 1 << 16) >= 0:
        try:
            orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
        except (OSError, ValueError, SyntaxError):
            return None
        if orientation not in range(1, 9):
            return None
        if orientation >= 5:  # rotated by 90 degrees
            height, width = width, height
    return height, width


@pipeline_def(enable_conditionals=True)
def _graph(
    reader: Reader, sizes: list[int], device: str, decoder: DecoderSettings, workers: int, ahead: int
) -> tuple[DataNode, ...]:
    """Return per view uint8 [S, S, 3], the index of the image shown, and the note about unreadable images."""
    jpeg, pixels, encoded, shown, note, *inputs = fn.external_source(
        source=reader,
        num_outputs=len(COMMON_LAYOUTS) + PER_VIEW * len(sizes),
        layout=COMMON_LAYOUTS,
        parallel=workers > 0,
        prefetch_queue_depth=ahead if workers else None,
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
    views = [_view(image, size, *inputs[PER_VIEW * v : PER_VIEW * (v + 1)]) for v, size in enumerate(sizes)]
    return *views, shown, note


def _view(
    image: DataNode,
    size: int,
    start: DataNode,
    end: DataNode,
    flip: DataNode,
    recolored: DataNode,
    linear: DataNode,
    offset: DataNode,
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
        recolored: Whether to apply `linear` and `offset`.
        linear: [3, 3]; the colour becomes `linear @ rgb + offset @ mean`, with the mean colour of the resized crop.
        offset: [3, 3], see `linear`. It multiplies the mean in a transform of its own: the mean is on the GPU, and as
            an argument of the first transform it would have to be in host memory, for which the host would wait.
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
        color = fn.coord_transform(view, M=linear) + fn.coord_transform(mean, M=offset)
        view = fn.cast(dali_math.clamp(color, 0.0, 255.0), dtype=types.UINT8)
    if sigma > 0:
        view = fn.gaussian_blur(view, sigma=sigma)  # with a window of 2 ceil(3 sigma) + 1
    if solarize:
        view = fn.lookup_table(view, keys=list(range(256)), values=SOLARIZED, dtype=types.UINT8)
    return view


def _pipeline(dataset: TrainDataset, start: int, stop: int, device: torch.device) -> Pipeline:
    settings, on_gpu = dataset.settings, device.type == "cuda"
    workers = settings.workers_for(device)
    # For the fork server's advantages see `data.loader.iterate`. DALI documents fork and spawn only, but passes the
    # name on to multiprocessing. Its pickling lets the workers share the index instead of copying it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["data.fork_server", "data.dali"])
    return _graph(
        Reader(dataset, start, stop),
        [view.size for view in settings.views],
        "gpu" if on_gpu else "cpu",
        settings.decoder,
        workers,
        ahead=max(workers, settings.prefetch),
        batch_size=settings.batch_size // dataset.world_size,
        num_threads=max(1, workers),
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=settings.prefetch,
        py_num_workers=workers,
        py_start_method="forkserver",
    )


def batches(dataset: TrainDataset, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of global steps `start` to `stop` - 1, with views on the device.

    `settings.workers` processes read, as many threads decode, and `settings.prefetch` batches are made ahead.

    Raises:
        ValueError: See `data.loader.train_batches`.
        RuntimeError: DALI failed ten steps in a row.
    """
    step, failed = start, 0
    while step < stop:
        pipeline = _pipeline(dataset, step, stop, device)
        pipeline.build()
        while step < stop:
            try:
                # With torch's stream, the GPU waits for DALI's work and the host does not.
                outputs = pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)
            except RuntimeError as error:
                failed += 1
                if failed == MAX_FAILURES:
                    raise
                log.warning("step %d: DALI failed, so the CPU backend makes its batch: %s", step, _reason(error))
                break
            failed = 0
            yield _to_batch(outputs)
            step += 1
        else:
            return
        del pipeline  # its worker processes must end before those of the next pipeline start
        yield dataset[step]
        step += 1


def _to_batch(outputs: tuple) -> Batch:
    """Wrap the outputs of the graph. Raises ValueError if the reader found no readable image."""
    *views, shown, note = outputs
    unreadable, error = json.loads(bytes(note.at(0)))
    if error:
        raise ValueError(error)
    # Nothing is copied: DALI keeps the memory until torch releases it. DALI does not know torch's stream, so on a GPU
    # all work on a batch must be done before the batch is released (training waits for each step's gradient norm).
    tensors = [torch.from_dlpack(view.as_tensor()) for view in views]
    return Batch(tensors, torch.from_numpy(shown.as_array().copy()), [(i, reason) for i, reason in unreadable])


def _reason(error: Exception) -> str:
    """Return the part of DALI's message that names the cause."""
    text = str(error)
    return " ".join((text.partition("encountered:")[2] or text).partition("Current pipeline")[0].split())
