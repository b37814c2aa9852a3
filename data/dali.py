"""The DALI backend: decoding and `ViewParams` applied by a DALI pipeline, on a GPU or, without one, on the CPU.

    step -> Reader (worker processes): samples, encoded bytes, boxes, matrices -> external_source
         -> decode once -> per view: crop and resize, flip, colour matrix, blur, solarize -> uint8 [B, S, S, 3]

Nothing is drawn in DALI: what happens to each view comes from `data.views`, a pure function of the step's number, so
there is no state to save and nothing depends on the number of workers. The views stay uint8 and channels-last, as the
CPU backend's: the network's first layer reads them through `data.loader.normalize`, one pass on the GPU over a quarter
of the bytes that normalised float images would keep in DALI's queues.

The pictures are those of `data.cpu` but for what its definition leaves to the decoder and to rounding; see
docs/data-backends.md for how far. On a GPU, JPEGs are decoded by nvJPEG with libjpeg-turbo's chroma upsampling. What
DALI cannot be trusted to read as the CPU backend does (anything but whole grey or YCbCr JPEGs) is decoded in the
reader, and so is no business of the pipeline's. If a picture breaks the pipeline all the same, that step's batch is
made by the CPU backend and the pipeline starts again after it.
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

from data.loader import Batch, Decoder, Steps, readable
from data.sources.open import UnreadableImage, decode
from data.views import LUMA, ViewParams, crop_boxes

log = logging.getLogger(__name__)

COMMON = ("", "HWC", "", "", "")  # layouts of the outputs of `Reader` that are not of a view
PER_VIEW = 8  # inputs of `_view` after the picture and the size
SOLARIZED = [min(value, 255 - value) for value in range(256)]
MOST_PIXELS = 1 << 27  # of a picture that DALI may decode: 400 MB
RESTARTS = 10  # in a row, before a failure is taken to be DALI's and not a picture's

Item = tuple[NDArray[np.uint8], int, int]  # encoded [n] or pixels [H, W, 3]; upright height and width


class Reader:
    """What DALI needs of a batch, by its number since `start`: the callable of the external source.

    Gives, for each of the B samples: the JPEG (uint8 [n], else one byte), the pixels (uint8 [H, W, 3], else one), which
    of both (bool), the sample shown (int64), and in the first one's place the unreadable ones as JSON; then for each
    view what `_view` takes.
    """

    def __init__(self, steps: Steps, start: int, stop: int) -> None:
        self.steps, self.start, self.stop = steps, start, stop

    def __call__(self, number: int) -> list[list[NDArray] | NDArray]:
        """Raises StopIteration at `stop`."""
        step = self.start + number
        if step >= self.stop:
            raise StopIteration
        samples, params = self.steps.plan(step)
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
        """The samples or what replaces them, which these are, and the note about those that cannot be read.

        An error goes by the note, too: DALI would give the main process a traceback of it as a text.
        """
        items, shown, bad, error = [], samples.copy(), [], ""  # type: ignore[var-annotated]
        try:
            for slot, sample in enumerate(samples.tolist()):
                item, shown[slot] = readable(self._load, len(self.steps.source), sample, bad)
                items.append(item)
        except ValueError as failure:
            error = str(failure)
            items = [(np.zeros((1, 1, 3), np.uint8), 1, 1)] * len(samples)
        return items, shown, json.dumps([bad, error]).encode()

    def _load(self, i: int) -> Item:
        data = self.steps.source.read(i)
        if isinstance(data, bytes):
            if size := jpeg_size(data):
                return np.frombuffer(data, np.uint8), *size
            try:
                data = decode(data)
            except ValueError as error:
                raise UnreadableImage(f"{self.steps.source.name(i)}: {error}") from error
        return np.ascontiguousarray(data), data.shape[0], data.shape[1]


def _view_inputs(params: ViewParams, boxes: NDArray[np.int64]) -> list[NDArray]:
    """One array [B, ...] for each input of `_view` after the picture and the size."""
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
    """Upright height and width of a JPEG that DALI reads as the CPU backend does; None for anything else.

    That is: grey or YCbCr, not huge, with its end where it should be, and an EXIF orientation, if any, that Pillow can
    read.
    Reads the headers only; damage between them is found by the decoder.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color not in ("Gray", "YCbCr") or height * width > MOST_PIXELS:
        return None
    if data.find(b"Exif\0\0", 0, 1 << 16) >= 0:
        try:
            orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
        except (OSError, ValueError, SyntaxError):
            return None
        if orientation not in range(1, 9):
            return None
        if orientation >= 5:  # a quarter turn
            height, width = width, height
    return height, width


@pipeline_def(enable_conditionals=True)
def _graph(
    reader: Reader, sizes: list[int], device: str, decoder: Decoder, workers: int, ahead: int
) -> tuple[DataNode, ...]:
    """One uint8 [S, S, 3] for each of `sizes`, the sample's number, and the note about unreadable ones."""
    jpeg, pixels, encoded, shown, note, *inputs = fn.external_source(
        source=reader,
        num_outputs=len(COMMON) + PER_VIEW * len(sizes),
        layout=COMMON,
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
    """A view of `image`, uint8 [size, size, 3], by parameters of `data.views`, all in host memory.

    start, end: (y, x) of the crop. linear [3, 3] and offset [3, 3]: the colour becomes linear @ rgb + offset @ mean,
    with the mean colour of the resized crop. The latter is on the GPU, which is why it is not an argument of the
    transform: those must be in host memory, and the host would wait for it.
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


def _pipeline(
    steps: Steps, start: int, stop: int, workers: int, prefetch: int, device: torch.device, decoder: Decoder
) -> Pipeline:
    # The fork server for the reason in data.loader. DALI's own documentation names fork and spawn only, but passes the
    # name on to multiprocessing, whose pickling lets the workers share the index rather than copy it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["data.fork_server", "data.dali"])
    return _graph(
        Reader(steps, start, stop),
        [view.size for view in steps.views],
        "gpu" if device.type == "cuda" else "cpu",
        decoder,
        workers,
        ahead=max(workers, prefetch),
        batch_size=steps.batch_size // steps.world_size,
        num_threads=max(1, workers),
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
        py_num_workers=workers,
        py_start_method="forkserver",
    )


def batches(
    steps: Steps, start: int, stop: int, workers: int, prefetch: int, device: torch.device, decoder: Decoder
) -> Iterator[Batch]:
    """The batches of global steps start..stop - 1, their views on `device`, `prefetch` of them made ahead.

    `workers` processes read, and as many threads decode. Raises ValueError as `data.loader.train_batches` does, and
    RuntimeError, DALI's own, if it fails ten steps in a row.
    """
    step, failed = start, 0
    while step < stop:
        pipeline = _pipeline(steps, step, stop, workers, prefetch, device, decoder)
        pipeline.build()
        while step < stop:
            try:
                # On torch's stream the GPU waits for DALI's work, and not the host.
                outputs = pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)
            except RuntimeError as error:
                failed += 1
                if failed == RESTARTS:
                    raise
                log.warning("step %d: DALI failed, so the CPU backend makes its batch: %s", step, _reason(error))
                break
            failed = 0
            yield _to_batch(outputs)
            step += 1
        else:
            return
        del pipeline  # its worker processes end before others start
        yield steps[step]
        step += 1


def _to_batch(outputs: tuple) -> Batch:
    """Raises ValueError where the reader found nothing readable."""
    *views, shown, note = outputs
    bad, error = json.loads(bytes(note.at(0)))
    if error:
        raise ValueError(error)
    # No copies: DALI keeps the memory until torch lets go of it. It does not know of torch's stream: on a GPU, what is
    # made of a batch has to be done before the batch is let go (training waits for each step's gradient norm).
    tensors = [torch.from_dlpack(view.as_tensor()) for view in views]
    return Batch(tensors, torch.from_numpy(shown.as_array().copy()), [(i, reason) for i, reason in bad])


def _reason(error: Exception) -> str:
    """The part of DALI's message that says what happened."""
    text = str(error)
    return " ".join((text.partition("encountered:")[2] or text).partition("Current pipeline")[0].split())
