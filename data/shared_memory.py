"""Shared memory (/dev/shm), through which worker processes send batches: how much they need, and whether it is there.

Docker gives a container 64 MB, which is less than one batch of 256 x 2 views of 224 pixels.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from data.settings import DataSettings
from data.sources.base import Source, UnreadableImage

FOLDER = Path("/dev/shm")
CURE = "start the container with --shm-size=SIZE or --ipc=host, or lower data.workers or data.prefetch"
EVALUATION_PREFETCH = 2  # batches made ahead by each worker of an evaluation
EXAMINED = 16  # stored images whose mean size is that of all

# Signals that end a worker, and their usual reasons.
_REASONS = {
    7: f"a bus error: {FOLDER} is full; {CURE}",
    9: "SIGKILL: the machine or the job ran out of memory and its out-of-memory killer chose this process; lower "
    "data.workers or data.prefetch, or ask for more memory",
    11: "a segmentation fault in a decoder: `python -m trainer data verify SRC` finds the image",
}


def training_bytes(source: Source, settings: DataSettings, device: torch.device, world_size: int) -> int:
    """Return the bytes of shared memory that a rank's batches can occupy at the same time."""
    images, workers = settings.batch_size // world_size, settings.workers_for(device)
    if settings.backend_for(device) == "dali":
        return dali_bytes(source, images, settings, workers)
    return images * sum(3 * view.size**2 for view in settings.views) * queued(workers, settings.prefetch, in_use=2)


def dali_bytes(source: Source, images: int, settings: DataSettings, workers: int) -> int:
    """Return the bytes of shared memory that batches of so many stored images can occupy."""
    return images * _stored_bytes(source) * queued(workers, dali_prefetch(settings, workers)) if workers else 0


def evaluation_bytes(size: int, batch_size: int, workers: int) -> int:
    """Return the bytes of shared memory that the batches of an evaluation can occupy; views have `size` pixels."""
    return batch_size * 3 * size**2 * queued(workers, EVALUATION_PREFETCH)


def queued(workers: int, prefetch: int, in_use: int = 1) -> int:
    """Return how many batches exist at the same time: those made ahead, and those in use.

    Training uses two: the batch of a step is kept until the next one has begun, for a replay.
    """
    return workers * prefetch + in_use if workers else 0


def dali_prefetch(settings: DataSettings, workers: int) -> int:
    """Return the batches that each worker reads ahead for DALI, which has queues of its own."""
    return -(-max(workers, settings.prefetch) // max(1, workers))


def local_ranks() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def shortage(needed: int, ranks: int) -> str | None:
    """Return why the batches of `ranks` ranks, `needed` bytes each, do not fit into shared memory; None if they do."""
    if not needed or not FOLDER.is_dir():
        return None
    total, _, free = shutil.disk_usage(FOLDER)
    if total >= needed * ranks and free >= needed:
        return None
    processes = f"{ranks} ranks" if ranks > 1 else "one rank"
    return (
        f"{FOLDER} has {_mb(total)}, of which {_mb(free)} are free, but the batches that workers make ahead take "
        f"{_mb(needed * ranks)} ({processes}); {CURE}"
    )


def check(needed: int) -> None:
    """Raise ValueError if the batches of this machine's ranks, `needed` bytes each, do not fit into shared memory."""
    if problem := shortage(needed, local_ranks()):
        raise ValueError(problem)


def describe_exit(code: int) -> str:
    """Return why a worker ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}; its own message is above"
    return _REASONS.get(-code, f"signal {-code}")


def is_shortage(error: BaseException) -> bool:
    """Return whether an error of torch or the system says that shared memory is full."""
    return isinstance(error, OSError | RuntimeError) and "No space left on device" in str(error)


def _stored_bytes(source: Source) -> int:
    """Return the mean size of an image as it goes to DALI: an encoded JPEG, or pixels. Reads a few images."""
    sizes = []
    for i in np.linspace(0, len(source) - 1, min(EXAMINED, len(source))).astype(int).tolist():
        try:
            stored = source.read(i)
            if isinstance(stored, bytes) and not stored.startswith(b"\xff\xd8"):
                stored = source.image(i)
        except UnreadableImage:
            continue
        sizes.append(len(stored) if isinstance(stored, bytes) else stored.nbytes)
    return round(np.mean(sizes)) if sizes else 0


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
