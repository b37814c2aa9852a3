"""The commands `python -m trainer data`: index and verify a data set, write it as tar shards, draw its views."""

import fcntl
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.cpu import render_center
from data.loader import train_batches
from data.order import epoch_order
from data.settings import DataSettings
from data.sources.base import LabelledSource, Source, UnreadableImage
from data.sources.index import Listing
from data.sources.open import open_source
from data.sources.parquet import ParquetFiles
from data.sources.selection import EXTENSIONS

CHUNK = 64  # images that a thread verifies at a time
PLAN = ".plan.json"  # describes the shards being written, in their unfinished folder
MAGIC = ((rb"\xff\xd8", ".jpg"), (rb"\x89PNG", ".png"), (rb"RIFF....WEBP", ".webp"), (rb"BM", ".bmp"))


def make_index(path: str, out: Path) -> str:
    """List the data set at `path` in the new file `out`, which can replace it as `data.train`; return a summary.

    Raises:
        ValueError: `out` exists, or data sets of this format have no index.
    """
    _check_new_index(out)
    source = _require_listing(open_source(path))
    source.save(out)
    size = out.stat().st_size / len(source)
    return f"{len(source):,} images in {len(source.classes):,} classes, {size:.0f} bytes each: {out}"


def verify(path: str, out: Path | None, threads: int) -> tuple[list[str], int]:
    """Read and decode every image.

    Args:
        path: The data set.
        out: New file for an index of the readable images; None for no index.
        threads: Number of threads.

    Returns:
        One line per unreadable image, and the number of all images.

    Raises:
        ValueError: `out` exists, or data sets of this format have no index.
    """
    source = open_source(path)
    if out:
        _check_new_index(out)
        _require_listing(source)

    def check(start: int) -> tuple[int, list[tuple[int, str]]]:
        samples = range(start, min(start + CHUNK, len(source)))
        unreadable = []
        for i in samples:
            try:
                source.image(i)
            except UnreadableImage as error:
                unreadable.append((i, str(error)))
        return len(samples), unreadable

    unreadable: list[tuple[int, str]] = []
    # Threads suffice because reading and both decoders release the interpreter's lock.
    with _progress_bar() as bar, ThreadPool(threads) as pool:
        task = bar.add_task("", total=len(source))
        for done, found in pool.imap_unordered(check, range(0, len(source), CHUNK)):
            unreadable += found
            bar.advance(task, done)
    unreadable.sort()
    if out:
        _require_listing(source).without([i for i, _ in unreadable]).save(out)
    return [line for _, line in unreadable], len(source)


def write_shards(path: str, dest: Path, samples: int, threads: int, seed: int | None) -> str:
    """Write a data set as tar shards in WebDataset's layout and return a summary.

    Encoded images are copied unchanged. Labels are .cls members with the class number; classes.txt has the names.
    Shards differ by at most one image in size. The work is done in DEST.partial, which is renamed at the end; the same
    call continues interrupted work.

    Args:
        path: The data set.
        dest: New folder for the shards.
        samples: Maximum number of images in a shard.
        threads: Number of threads.
        seed: Seed of the shuffling; None keeps the order of the data set.

    Raises:
        ValueError: `dest` exists, DEST.partial belongs to other work or is in use, or an image cannot be read or is not
            encoded.
    """
    _refuse_existing(dest)
    source = open_source(path)
    try:
        stored = source.read(0)
    except UnreadableImage as error:
        raise _without_image(error) from error
    if not isinstance(stored, bytes):
        raise ValueError(f"{path} stores pixels, not encoded images, so there are no bytes to copy")
    assert isinstance(source, LabelledSource)  # a data set of the user's gives pixels
    if isinstance(source, ParquetFiles) and seed is not None:
        raise ValueError(
            f"{path} is read in groups of rows, and a shuffled order would read a group per image: give --no-shuffle"
        )
    shards = -(-len(source) // samples)
    order = np.arange(len(source)) if seed is None else epoch_order(len(source), seed, 0)
    bounds = np.linspace(0, len(source), shards + 1).astype(np.int64)
    partial = dest.with_name(dest.name + ".partial")
    plan: dict[str, object] = {
        "source": str(Path(path).resolve()),
        "images": len(source),
        "shards": shards,
        "seed": seed,
        "content": {name: zlib.crc32(np.ascontiguousarray(x).data) for name, x in source.identity().items()},
    }
    with _claimed(partial, plan), _progress_bar() as bar:
        task = bar.add_task("", total=len(source))

        def write(shard: int) -> None:
            target = partial / f"shard-{shard:06d}.tar"
            chosen = order[bounds[shard] : bounds[shard + 1]]
            if not target.exists():
                _write_shard(source, chosen, target)
            bar.advance(task, len(chosen))

        with ThreadPoolExecutor(threads) as pool:
            try:
                list(pool.map(write, range(shards)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        classes = "".join(name + "\n" for name in source.classes)
        (partial / "classes.txt").write_text(classes, encoding="utf-8")
        os.rename(partial, dest)
        (dest / PLAN).unlink()
    return f"{len(source):,} images in {shards} shards: {dest}"


def draw_views(settings: DataSettings, seed: int, device: torch.device, out: Path, samples: int) -> None:
    """Write a PNG with a row for each of the first images of the first epoch: the image, then its views.

    Args:
        settings: Data set, views and backend.
        seed: Seed of the run.
        device: Device for which the backend makes the views.
        out: New file.
        samples: Number of images.

    Raises:
        ValueError: `out` exists, or no image can be read.
    """
    _refuse_existing(out)
    source = open_source(settings.train)
    settings = settings.model_copy(update={"batch_size": samples, "workers": 0})
    batch = next(train_batches(source, settings, seed, 0, 1, 0, 1, device))
    side = max(view.size for view in settings.views)
    originals = np.stack([render_center(source.image(i), side) for i in batch.samples.tolist()])
    columns = [originals, *(view.cpu().numpy() for view in batch.views)]
    cells = [np.pad(x, ((0, 0), (0, side + 2 - x.shape[1]), (0, side + 2 - x.shape[2]), (0, 0))) for x in columns]
    drawing = np.concatenate(list(np.concatenate(cells, axis=2)))
    out.write_bytes(cv2.imencode(".png", cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))[1].tobytes())


@contextmanager
def _claimed(folder: Path, plan: dict[str, object]) -> Iterator[None]:
    """Lock a folder, which is new or has the same plan from interrupted work, or raise ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [entry for entry in os.scandir(folder) if entry.name != PLAN]
    with (folder / PLAN).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there") from None
        file.seek(0)
        before, now = file.read(), json.dumps(plan)
        if before != now and (before or others):
            raise ValueError(
                f"{folder} belongs to other work, with {before or 'no plan'} instead of {now}. Delete or rename it"
            )
        if not before:
            file.write(now)
            file.flush()
            os.fsync(file.fileno())
        yield


def _write_shard(source: Source, samples: NDArray[np.int64], target: Path) -> None:
    """Atomically write a tar with the encoded images and their labels in the given order."""
    temporary = target.with_name("." + target.name)
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in samples.tolist():
                try:
                    data = source.read(i)
                except UnreadableImage as error:
                    raise _without_image(error) from error
                assert isinstance(data, bytes)
                key, ending = _member_name(source.name(i), i, data)
                _add(tar, key + ending, data)
                _add(tar, key + ".cls", str(source.labels[i]).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _without_image(error: UnreadableImage) -> ValueError:
    return ValueError(f"{error}; `data verify SRC --out good.npz` makes an index without this image")


def _member_name(name: str, i: int, data: bytes) -> tuple[str, str]:
    """Return key (unique, and without dots, as WebDataset demands) and ending of an image in a shard."""
    stem, ending = os.path.splitext(name)
    if os.fsencode(ending.lower()) not in EXTENSIONS:
        stem = name
        endings = [ending for magic, ending in MAGIC if re.match(magic, data, re.DOTALL)]
        if not endings:
            raise ValueError(f"{name} is not a JPEG, PNG, WebP or BMP image")
        ending = endings[0]
    return f"{re.sub(r'[^-/0-9A-Za-z_]', '_', stem)}-{i}", ending


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _require_listing(source: Source) -> Listing:
    if not isinstance(source, Listing):
        raise ValueError("only folders of images, tar shards and Arrow files have an index; this opens without one")
    return source


def _check_new_index(path: Path) -> None:
    _refuse_existing(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the name of an index must end in .npz")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists: choose another name, nothing is overwritten")


def _progress_bar() -> Progress:
    """Return a bar on standard error, shown on a terminal only; results go to standard output."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
