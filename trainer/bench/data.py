"""Who waits for whom: images/s of each data backend, what each operation costs, and images/s that the network eats.

`pil` is the pipeline of the published code, and of most others: PIL and torchvision's transforms in a DataLoader of
two processes. It draws its own random numbers from the same distributions.
"""

import io
import json
import logging
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data.loader import train_batches
from data.normalize import MEAN, STD, normalize
from data.order import batch_samples
from data.sources.open import Source
from data.views import Augment, View
from trainer import distributed
from trainer.build import fill_bank
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.run.metrics import set_up_logging
from trainer.run.sources import open_training
from trainer.train_step import Rates, TrainStep

log = logging.getLogger(__name__)

Backend = Literal["pil", "cpu", "dali"]
BACKENDS: tuple[Backend, ...] = ("pil", "cpu", "dali")
PIL_WORKERS = 2
PIXELS = 64 * 2 * 224 * 224  # of a batch that is timed: workers deliver whole batches, large ones make coarse clocks
FOREVER = 1 << 40
Costs = dict[str, float]
# Each adds to what is switched on before; what the difference costs is the operation's.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "flip": ("flip",),
    "colour": ("jitter", "gray"),
    "blur": ("blur",),
    "solarize": ("solarize",),
}


def run(config: Config, folder: Path, seconds: float, repeats: int, workers: int | None) -> dict[str, Any]:
    """Each backend's images/s, median of `repeats` turns of `seconds` each; the cost of operations; the network's need.

    An image is all views of a sample, normalised, on the device. Samples come from memory, where the system keeps files
    that were read before: all of a small data set from the second epoch on. `workers`: processes of cpu and dali; None:
    what the configuration gets on this machine, but no fewer than pil has.
    """
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        source = open_training(config, folder)
        views = sum(view.size**2 for view in config.data.views)
        batch_size = min(config.data.batch_size, max(16, PIXELS // views), len(source))
        workers = workers or max(PIL_WORKERS, config.data.workers_for(rank_info.device))
        _read_ahead(source)
        speeds: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for _ in range(repeats):
            for name in BACKENDS:
                batches = _batches(name, source, config, batch_size, rank_info, workers)
                speeds[name].append(_speed(batches, rank_info, batch_size, workers, seconds))
                log.info("%s: %.0f images/s", name, speeds[name][-1])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker process
        costs = _operations(source, config, rank_info, batch_size, repeats)
        torch.set_num_threads(threads)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        return {
            "data": config.data.train,
            "views": [view.size for view in config.data.views],
            "batch_size": batch_size,
            "device": torch.cuda.get_device_name() if rank_info.device.type == "cuda" else "CPU",
            "cores": len(os.sched_getaffinity(0)),
            "processor": _processor(),
            "workers": {name: PIL_WORKERS if name == "pil" else workers for name in BACKENDS},
            "seconds": seconds,
            "repeats": repeats,
            "turns": speeds,
            "images_per_second": medians,
            "times_pil": {name: medians[name] / medians["pil"] for name in BACKENDS},
            "milliseconds": costs,
            "backend": config.data.backend_for(rank_info.device),
            "backbone": config.model.backbone,
            "network_images_per_second": _training_throughput(config, rank_info, source),
            "torch": torch.__version__,
        }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as two tables and a sentence, and write it to `out` as JSON."""
    console = Console()
    eats, speeds = result["network_images_per_second"], result["images_per_second"]
    sizes = ", ".join(map(str, result["views"]))
    table = Table(title=f"{result['data']}, views of {sizes} pixels, batches of {result['batch_size']}", box=None)
    for column in ("", "processes", "images/s", "times pil", "of the network's need"):
        table.add_column(column, justify="right" if column else "left")
    for name in BACKENDS:
        share = f"{100 * speeds[name] / eats:,.0f} %"
        table.add_row(
            name,
            str(result["workers"][name]),
            f"{speeds[name]:,.0f}",
            f"{result['times_pil'][name]:.2f}",
            share,
        )
    console.print(table)
    table = Table(title="one process, milliseconds per image and share of each operation", box=None)
    table.add_column("")
    costs = result["milliseconds"]
    for name in costs:
        table.add_column(name, justify="right")
        table.add_column("", justify="right")
    for operation in costs["pil"]:
        row = [operation]
        for name in costs:
            cost, total = costs[name][operation], sum(costs[name].values())
            row += [f"{cost:.3f}", f"{100 * cost / total:.0f} %"]
        table.add_row(*row)
    totals = [text for name in costs for text in (f"{sum(costs[name].values()):.3f}", "")]
    table.add_section()
    table.add_row("all", *totals)
    console.print(table)
    backend = result["backend"]
    speed = speeds[backend]
    verdict = (
        "the network does not wait"
        if speed >= eats
        else f"the network waits {100 * (1 - speed / eats):.0f} % of the time"
    )
    console.print(
        f"{result['backbone']} eats {eats:,.{0 if eats > 10 else 2}f} images/s on this device; "
        f"data.backend {backend} makes {speed:,.0f}: {verdict}."
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _batches(
    name: Backend, source: Source, config: Config, batch_size: int, rank_info: RankInfo, workers: int
) -> Iterator[list[Tensor]]:
    """Normalised float32 views on the device, without end."""
    data = config.data
    if name == "pil":
        loader = DataLoader(
            PilViews(source, list(data.views), data.augment),
            batch_sampler=Order(len(source), batch_size),
            num_workers=PIL_WORKERS,
            multiprocessing_context=multiprocessing.get_context("forkserver"),
            pin_memory=rank_info.device.type == "cuda",
        )
        for views in loader:
            yield [view.to(rank_info.device, non_blocking=True) for view in views]
        return
    update = {"batch_size": batch_size, "workers": workers, "backend": name, "order": "global"}
    for batch in train_batches(source, data.model_copy(update=update), 0, 0, 1, 0, FOREVER, rank_info.device):
        yield batch.normalized(rank_info.device)


def _read_ahead(source: Source) -> None:
    """Read the samples of the turns, in their order, for half a minute at most.

    All backends see the same ones, a fast one more of them than a slow one: it would be the first to wait for the disk,
    which is not what the turns compare.
    """
    until = time.monotonic() + 30
    for i in batch_samples(len(source), 0, 0, len(source), 0, 1)[1]:
        source.read(int(i))
        if time.monotonic() > until:
            break


def _speed(batches: Iterator[object], rank_info: RankInfo, batch_size: int, workers: int, seconds: float) -> float:
    """Images/s after what was made ahead at the start is gone."""
    group = max(workers, PIL_WORKERS)  # batches come in such groups
    for _ in range(2 * group):
        next(batches)
    _wait(rank_info)
    count, began, passed = 0, time.perf_counter(), 0.0
    while passed < seconds:
        for _ in range(group):
            next(batches)
        count += group
        _wait(rank_info)
        passed = time.perf_counter() - began
    return count * batch_size / passed


def _operations(source: Source, config: Config, rank_info: RankInfo, batch_size: int, repeats: int) -> dict[str, Costs]:
    """Milliseconds per image of each operation in one process, by backend.

    Processor time of all its threads, which other jobs lengthen little; on a GPU, time passed, and DALI's decoding is
    in its crop. The operations after the crop are switched on one after the other, and cost what is added: the samples
    and all other parameters stay the same. Medians of `repeats` batches; a difference below 0 is noise, and is 0.
    """
    clock = time.perf_counter if rank_info.device.type == "cuda" else time.process_time
    samples = batch_samples(len(source), 0, 0, batch_size, 0, 1)[1].tolist()
    views = config.data.views

    def timed(action: Callable[[], object], images: int = batch_size) -> float:
        values = []
        for _ in range(repeats + 1):
            _wait(rank_info)
            began = clock()
            action()
            _wait(rank_info)
            values.append(clock() - began)
        return 1e3 * statistics.median(values[1:]) / images

    on = {key: 0.0 for keys in OPERATIONS.values() for key in keys}
    levels = [config.data.augment.model_copy(update=on)]
    for keys in OPERATIONS.values():
        on |= {key: getattr(config.data.augment, key) for key in keys}
        levels.append(config.data.augment.model_copy(update=on))
    read = timed(lambda: [source.read(i) for i in samples])
    black = [torch.zeros(batch_size, v.size, v.size, 3, dtype=torch.uint8, device=rank_info.device) for v in views]
    normalised = timed(lambda: [normalize(x, rank_info.device) for x in black])
    costs: dict[str, Costs] = {}
    for name in BACKENDS:
        if name == "pil":
            made = [timed(partial(_make_pil, PilViews(source, list(views), level), samples)) for level in levels]
            pictures = [Image.new("RGB", (view.size, view.size)) for view in views] * batch_size
            normalised_here = timed(lambda x=pictures: [PIL_NORMALIZE(picture) for picture in x])  # type: ignore[misc]
            made = [cost - normalised_here for cost in made]
            decoded = timed(lambda: [np.asarray(pil_image(source, i)) for i in samples])
        else:
            normalised_here, decoded, made = normalised, timed(lambda: [source.image(i) for i in samples]), []
            for level in levels:
                update = {"augment": level, "batch_size": batch_size, "workers": 0, "backend": name, "order": "global"}
                settings = config.data.model_copy(update=update)
                batches = train_batches(source, settings, 0, 0, 1, 0, FOREVER, rank_info.device)
                next(batches)
                made.append(timed(lambda x=batches: [next(x) for _ in range(2)], 2 * batch_size))  # type: ignore[misc]
            if name == "dali" and rank_info.device.type == "cuda":
                decoded = read
        stages = {"read": read, "decode": decoded - read, "crop, resize": made[0] - decoded}
        stages |= {key: after - before for key, before, after in zip(OPERATIONS, made[:-1], made[1:], strict=True)}
        log.info("%s: %.2f ms an image in one process", name, made[-1] + normalised_here)
        costs[name] = {key: max(0.0, cost) for key, cost in (stages | {"normalise": normalised_here}).items()}
    return costs


def _make_pil(pil: "PilViews", samples: list[int]) -> None:
    random.seed(0)
    torch.manual_seed(0)
    for i in samples:
        pil[i]


def _training_throughput(config: Config, rank_info: RankInfo, source: Source) -> float:
    """Images/s of training steps on images that are on the device already; all ranks' together would be more."""
    on_gpu = rank_info.device.type == "cuda"
    batch = config.data.batch_size // rank_info.world_size
    if not on_gpu:  # a step of 256 images of 224 pixels takes minutes there, and no longer per image than a small one
        batch = min(batch, 16)
    bank = config.bank.model_copy(update={"init": "random"})
    data = config.data.model_copy(update={"batch_size": batch * rank_info.world_size})
    config = config.model_copy(update={"bank": bank, "data": data})
    train_step = TrainStep(config, rank_info)
    fill_bank(train_step.method.bank, config, rank_info, source)
    views = [
        normalize(torch.randint(0, 256, (batch, v.size, v.size, 3), dtype=torch.uint8), rank_info.device)
        for v in config.data.views
    ]
    rates = Rates(lr=0.0, bank_lr=0.0, teacher_momentum=config.method.teacher_momentum)
    times = []
    for i in range(23 if on_gpu else 4):
        _wait(rank_info)
        began = time.perf_counter()
        train_step.step(views, i, rates)
        _wait(rank_info)
        times.append(time.perf_counter() - began)
    return batch * rank_info.world_size / statistics.median(times[3 if on_gpu else 1 :])


def _wait(rank_info: RankInfo) -> None:
    if rank_info.device.type == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# The pipeline of the published code


class PilViews(Dataset[list[Tensor]]):
    """Normalised views of a sample, float32 [3, S, S] each, by PIL and torchvision."""

    def __init__(self, source: Source, views: list[View], augment: Augment) -> None:
        self.source, self.transforms = source, [pil_transform(view, augment) for view in views]

    def __getitem__(self, i: int) -> list[Tensor]:
        image = pil_image(self.source, i)
        return [transform(image) for transform in self.transforms]


class Order:
    """Batches of samples in our order, without end: a DataLoader's batch sampler."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n, self.batch_size = n, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(FOREVER):
            yield batch_samples(self.n, 0, step, self.batch_size, 0, 1)[1].tolist()


def pil_image(source: Source, i: int) -> Image.Image:
    """Sample i, decoded by PIL."""
    data = source.read(i)
    image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(data)
    return image.convert("RGB")


class PilBlur:
    """MoCo v2's, which AdCo takes over: PIL's filter with a radius from `sigma`."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


PIL_NORMALIZE = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def pil_transform(view: View, augment: Augment) -> Callable[[Image.Image], Tensor]:
    """torchvision's transforms in the order of https://github.com/maple-research-lab/AdCo."""
    jitter = transforms.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, scale=view.scale, ratio=augment.ratio),
            transforms.RandomApply([jitter], p=augment.jitter),
            transforms.RandomGrayscale(p=augment.gray),
            transforms.RandomApply([PilBlur(augment.blur_sigma)], p=augment.blur),
            transforms.RandomSolarize(128, p=augment.solarize),
            transforms.RandomHorizontalFlip(p=augment.flip),
            PIL_NORMALIZE,
        ]
    )
