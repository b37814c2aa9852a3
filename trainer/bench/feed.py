"""The cost of feeding DALI: processor time per batch of the thread that launches the training step.

`inline` feeds DALI in that thread, `thread` is what training does: another thread feeds, and the launching thread only
takes finished batches. Both threads share Python's lock, so the launching thread also loses at most the time that the
other one computes, most of it in calls that hold the lock. Processor time, unlike elapsed time, depends little on other
jobs and not at all on how fast the images are decoded.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data import ahead, dali
from data.batch import Batch, TrainDataset
from data.watch import WatchedSource
from trainer import distributed
from trainer.bench import harness
from trainer.config import Config
from trainer.run.metrics import set_up_logging
from trainer.run.sources import open_training

ENDLESS = 1 << 40  # steps
WARMUP = 5  # batches


def run(config: Config, folder: Path, batch_sizes: list[int], batches: int, repeats: int) -> dict[str, Any]:
    """Measure both modes in alternating turns.

    Args:
        config: Gives the images, the views and the number of workers.
        folder: Receives the listing of a folder of images.
        batch_sizes: Images per batch.
        batches: Number of batches per turn.
        repeats: Turns of each mode; results are medians.
    """
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        device, source = rank_info.device, open_training(config, folder)
        workers = max(1, config.data.workers_for(device))
        rows = []
        for batch_size in batch_sizes:
            data = config.data.model_copy(update={"batch_size": batch_size, "workers": workers, "backend": "dali"})
            dataset = TrainDataset(WatchedSource(source), data, 0, 0, 1)
            turns: dict[str, list[tuple[float, float]]] = {"inline": [], "thread": []}
            for _ in range(repeats):
                for mode, found in turns.items():
                    make = dali.make_batches if mode == "inline" else dali.batches
                    found.append(_measure(make(dataset, data, 0, ENDLESS, device), batches))
            for mode, found in turns.items():
                launching, feeding = (statistics.median(values) for values in zip(*found, strict=True))
                rows.append({"batch_size": batch_size, "mode": mode, "launching_ms": launching, "feeding_ms": feeding})
        return {
            "data": config.data.train,
            "views": [view.size for view in config.data.views],
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "workers": workers,
            "batches": batches,
            "repeats": repeats,
            "rows": rows,
            **harness.environment(),
        }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as a table and write it to `out` as JSON."""
    harness.print_table(
        f"{result['data']}, {len(result['views'])} views, {result['workers']} workers: milliseconds per batch",
        ("images", "mode", "launching thread", "feeding thread"),
        [
            (str(row["batch_size"]), row["mode"], f"{row['launching_ms']:.2f}", f"{row['feeding_ms']:.2f}")
            for row in result["rows"]
        ],
    )
    harness.write_result(out, result)


def _measure(iterator: Iterator[Batch], batches: int) -> tuple[float, float]:
    """Return the milliseconds per batch that this thread and the feeding thread compute."""
    for _ in range(WARMUP):
        next(iterator)
    feeding = [thread.ident for thread in threading.enumerate() if thread.name == ahead.NAME]
    clocks = [time.pthread_getcpuclockid(ident) for ident in feeding if ident is not None]
    launched, fed = time.thread_time(), sum(map(time.clock_gettime, clocks))
    for _ in range(batches):
        next(iterator)
    launched, fed = time.thread_time() - launched, sum(map(time.clock_gettime, clocks)) - fed
    return 1e3 * launched / batches, 1e3 * fed / batches
