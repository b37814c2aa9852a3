"""Data-loading throughput: images/s of each data backend, the cost of each operation, and the network's own throughput.

The backend `pil` is the pipeline of the published code (`trainer.bench.pil`), for comparison.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.batch import Batch
from data.loader import train_batches
from data.normalize import normalize
from data.order import batch_samples
from data.settings import DataSettings
from data.sources.base import Source
from trainer import distributed
from trainer.bench import harness, pil
from trainer.bench.synthetic import build_step, frozen_rates, random_views
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.run.metrics import set_up_logging
from trainer.run.sources import open_training

Backend = Literal["cpu", "dali"]
BACKENDS: tuple[Backend, ...] = ("cpu", "dali")
Costs = dict[str, float]  # milliseconds per image by operation
BATCH_PIXELS = 64 * 2 * 224 * 224  # workers deliver whole batches, so larger ones would make the clock coarse
CPU_BATCH = 16  # images of a training step on a CPU, where larger batches take minutes and are no faster per image
ENDLESS = 1 << 40  # steps
READ_AHEAD_SECONDS = 30
# Operations after the crop, with the fields of `Augment` that enable each. They are enabled one after the other.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "flip": ("flip",),
    "colour": ("jitter", "gray"),
    "blur": ("blur",),
    "solarize": ("solarize",),
}


def run(config: Config, folder: Path, turn_seconds: float, repeats: int, workers: int | None) -> dict[str, Any]:
    """Measure the backends in alternating turns, then each operation, then the network.

    An image counts with all its views, normalised and on the device.

    Args:
        config: The configuration.
        folder: Receives the listing of a folder of images.
        turn_seconds: Length of a turn.
        repeats: Turns of each backend, and measurements of each operation.
        workers: Processes of cpu and dali; None for those of the configuration, but at least as many as pil has.
    """
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        device, source = rank_info.device, open_training(config, folder)
        pixels = sum(view.size**2 for view in config.data.views)
        batch_size = min(config.data.batch_size, max(16, BATCH_PIXELS // pixels), len(source))
        workers = workers or max(pil.WORKERS, config.data.workers_for(device))
        data = config.data.model_copy(update={"batch_size": batch_size, "workers": workers, "order": "global"})
        _read_ahead(source)
        iterators: dict[str, Callable[[], Iterator[list[Tensor]]]] = {
            "pil": lambda: pil.batches(source, data, device),
            **{name: partial(_normalized_batches, name, source, data, device) for name in BACKENDS},
        }
        chunk = max(workers, pil.WORKERS)  # workers deliver batches in such groups

        def turn(batches: Callable[[], Iterator[list[Tensor]]]) -> float:
            return batch_size * _batches_per_second(batches(), chunk, device, turn_seconds)

        turns = harness.interleave({name: partial(turn, batches) for name, batches in iterators.items()}, repeats)
        speeds, facts = harness.medians(turns), harness.environment()
        return {
            "data": data.train,
            "views": [view.size for view in data.views],
            "batch_size": batch_size,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "cores": facts["machine"]["cores"],
            "processor": facts["machine"]["cpu"],
            "workers": {"pil": pil.WORKERS, **dict.fromkeys(BACKENDS, workers)},
            "seconds": turn_seconds,
            "repeats": repeats,
            "turns": turns,
            "images_per_second": speeds,
            "times_pil": {name: speed / speeds["pil"] for name, speed in speeds.items()},
            "milliseconds": _operation_costs(source, data, device, repeats),
            "backend": data.backend_for(device),
            "backbone": config.model.backbone,
            "network_images_per_second": _training_throughput(config, rank_info),
            **facts,
        }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as two tables and a conclusion, and write it to `out` as JSON."""
    network, speeds, costs = result["network_images_per_second"], result["images_per_second"], result["milliseconds"]
    harness.print_rows(
        f"{result['data']}, views of {', '.join(map(str, result['views']))} pixels, batches of {result['batch_size']}",
        {
            "": str,
            "processes": lambda name: str(result["workers"][name]),
            "images/s": lambda name: f"{speeds[name]:,.0f}",
            "times pil": lambda name: f"{result['times_pil'][name]:.2f}",
            "share of the network's throughput": lambda name: f"{100 * speeds[name] / network:,.0f} %",
        },
        speeds,
    )
    totals = {name: sum(cost.values()) for name, cost in costs.items()}
    rows = [
        [operation, *(f"{costs[name][operation]:.3f} {costs[name][operation] / totals[name]:5.0%}" for name in costs)]
        for operation in costs["pil"]
    ]
    harness.print_table(
        "milliseconds per image and share of each operation, in one process",
        ("", *costs),
        [*rows, (), ("all", *(f"{total:.3f}  100%" for total in totals.values()))],
    )
    speed = speeds[result["backend"]]
    waiting = 100 * max(0.0, 1 - speed / network)
    print(
        f"{result['backbone']} trains {network:,.{0 if network > 10 else 2}f} images/s on this device and data.backend "
        f"{result['backend']} makes {speed:,.0f}: training waits for data {waiting:.0f} % of the time."
    )
    harness.write_result(out, result)


def _batches(name: Backend, source: Source, data: DataSettings, device: torch.device) -> Iterator[Batch]:
    """Return endless batches of a backend."""
    return train_batches(source, data.model_copy(update={"backend": name}), 0, 0, 1, 0, ENDLESS, device)


def _normalized_batches(
    name: Backend, source: Source, data: DataSettings, device: torch.device
) -> Iterator[list[Tensor]]:
    """Iterate without end over the normalised views of a backend on the device."""
    for batch in _batches(name, source, data, device):
        yield batch.normalized(device)


def _read_ahead(source: Source) -> None:
    """Read the samples in the order of the turns, so that no backend waits for the disk.

    All backends read the same samples. A fast one reads more of them and would be the first to wait.
    """
    end = time.monotonic() + READ_AHEAD_SECONDS
    for i in batch_samples(len(source), 0, 0, len(source), 0, 1)[1]:
        source.read(int(i))
        if time.monotonic() > end:
            break


def _batches_per_second(batches: Iterator[object], chunk: int, device: torch.device, turn_seconds: float) -> float:
    """Measure an iterator for a turn, without the batches that it prefetched at its start."""
    for _ in range(2 * chunk):
        next(batches)
    harness.synchronize(device)
    count, began, passed = 0, time.perf_counter(), 0.0
    while passed < turn_seconds:
        for _ in range(chunk):
            next(batches)
        count += chunk
        harness.synchronize(device)
        passed = time.perf_counter() - began
    return count / passed


def _operation_costs(source: Source, data: DataSettings, device: torch.device, repeats: int) -> dict[str, Costs]:
    """Return the milliseconds per image of each operation of each backend, in one process of one thread.

    They are processor time, which other jobs affect little; on a GPU, elapsed time, where DALI's decoding is part of
    its crop. Operations after the crop are enabled one after the other, on the same samples with the same parameters.
    The increase is the cost of each; a decrease is noise and counts as 0.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    samples = batch_samples(len(source), 0, 0, data.batch_size, 0, 1)[1].tolist()
    levels = _augment_levels(data)

    def cost(action: Callable[[], object], images: int = data.batch_size) -> float:
        action()
        return 1e3 * statistics.median(harness.seconds(action, device, clock) for _ in range(repeats)) / images

    def cost_of_batches(name: Backend, level: DataSettings) -> float:
        batches = _batches(name, source, level, device)
        return cost(lambda: [next(batches) for _ in range(2)], 2 * data.batch_size)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process
    read = cost(lambda: [source.read(i) for i in samples])
    decode = cost(lambda: [source.image(i) for i in samples])
    blank = [torch.zeros(data.batch_size, v.size, v.size, 3, dtype=torch.uint8, device=device) for v in data.views]
    normalise = cost(lambda: [normalize(x, device) for x in blank])
    pil_decode = cost(lambda: [np.asarray(pil.decode(source, i)) for i in samples])
    pil_blank = [Image.new("RGB", (view.size, view.size)) for view in data.views] * data.batch_size
    pil_normalise = cost(lambda: [pil.NORMALIZE(image) for image in pil_blank])
    pil_made = [cost(partial(pil.Views(source, level).make, samples)) - pil_normalise for level in levels]
    costs = {"pil": _differences(read, pil_decode, pil_made, pil_normalise)}
    for name in BACKENDS:
        decoded = read if name == "dali" and device.type == "cuda" else decode
        costs[name] = _differences(read, decoded, [cost_of_batches(name, level) for level in levels], normalise)
    torch.set_num_threads(threads)
    return costs


def _augment_levels(data: DataSettings) -> list[DataSettings]:
    """Return the settings with no operation after the crop, and then with one more enabled each time."""
    disabled = {key: 0.0 for keys in OPERATIONS.values() for key in keys}
    levels = []
    for keys in ((), *OPERATIONS.values()):
        disabled = {key: zero for key, zero in disabled.items() if key not in keys}
        views = tuple(v.model_copy(update={"augment": v.augment.model_copy(update=disabled)}) for v in data.views)
        levels.append(
            data.model_copy(update={"augment": data.augment.model_copy(update=disabled), "views": views, "workers": 0})
        )
    return levels


def _differences(read: float, decode: float, made: list[float], normalise: float) -> Costs:
    """Return the cost of each operation from the costs of all operations up to each level of augmentation."""
    steps = [0.0, read, decode, *made]
    costs = [after - before for before, after in pairwise(steps)]
    names = ("read", "decode", "crop, resize", *OPERATIONS, "normalise")
    return dict(zip(names, (max(0.0, x) for x in (*costs, normalise)), strict=True))


def _training_throughput(config: Config, rank_info: RankInfo) -> float:
    """Return the images/s of training steps on random images that are already on the device."""
    on_gpu = rank_info.device.type == "cuda"
    batch_size = config.data.batch_size if on_gpu else min(config.data.batch_size, CPU_BATCH * rank_info.world_size)
    config = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch_size})})
    train_step, views, rates = build_step(config, rank_info), random_views(config, rank_info), frozen_rates(config)
    warmup, steps = (3, 20) if on_gpu else (1, 3)
    times = [harness.seconds(lambda: train_step.step(views, 0, rates), rank_info.device) for _ in range(warmup + steps)]
    return batch_size / statistics.median(times[warmup:])
