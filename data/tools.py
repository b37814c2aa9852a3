"""The verbs of a data set: list it once, check every picture, write it into tar shards."""

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

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.order import epoch_order
from data.sources.arrow import ParquetFiles
from data.sources.folder import EXTENSIONS
from data.sources.open import Listing, Source, UnreadableImage, open_source

CHUNK = 64  # pictures a thread checks at a time
PLAN = ".plan.json"  # in a folder of shards that is not finished: what is being written
MAGIC = ((rb"\xff\xd8", ".jpg"), (rb"\x89PNG", ".png"), (rb"RIFF....WEBP", ".webp"), (rb"BM", ".bmp"))


def make_index(path: str, out: Path) -> str:
    """List the data set at `path` into the file `out`, which can then be given in its place; says what is in it.

    Raises ValueError if `out` exists or the data set needs no index.
    """
    _check_new_index(out)
    source = _listing(open_source(path))
    source.save(out)
    size = out.stat().st_size / len(source)
    return f"{len(source):,} images in {len(source.classes):,} classes, {size:.0f} bytes each: {out}"


def verify(path: str, out: Path | None, threads: int) -> tuple[list[str], int]:
    """Read and decode every picture; gives a line for each that cannot be, and the number of all.

    `out`: also write an index without the bad ones. Raises ValueError if it exists or the data set has no listing.
    """
    source = open_source(path)
    if out:
        _check_new_index(out)
        _listing(source)

    def check(start: int) -> tuple[int, list[tuple[int, str]]]:
        samples = range(start, min(start + CHUNK, len(source)))
        bad = []
        for i in samples:
            try:
                source.image(i)
            except UnreadableImage as error:
                bad.append((i, " ".join(str(error).split())))
        return len(samples), bad

    bad: list[tuple[int, str]] = []
    # Threads: file reads and both decoders let go of the interpreter's lock.
    with _bar() as bar, ThreadPool(threads) as pool:
        task = bar.add_task("", total=len(source))
        for done, found in pool.imap_unordered(check, range(0, len(source), CHUNK)):
            bad += found
            bar.advance(task, done)
    bad.sort()
    if out:
        _listing(source).without([i for i, _ in bad]).save(out)
    return [line for _, line in bad], len(source)


def write_shards(path: str, dest: Path, samples: int, threads: int, seed: int | None) -> str:
    """Write the data set at `path` into the new folder `dest`: shards of at most `samples` pictures, equal but for one.

    The pictures are shuffled by `seed`, or in the order of the source if it is None; their bytes are copied as they
    are. Labels are .cls members with the number of the class, names are in classes.txt. `dest` appears at once at the
    end. What was interrupted goes on where it was when the same is asked for again. Raises ValueError if `dest`
    exists, if DEST.partial is of something else or in use, or if a picture cannot be read or is not encoded.
    """
    _refuse_existing(dest)
    source = open_source(path)
    if any("\n" in name for name in source.classes):
        raise ValueError(f"{path} has classes with a line's end in their names: classes.txt cannot hold them")
    if not isinstance(source.read(0), bytes):
        raise ValueError(f"{path} stores pixels, not encoded pictures: there are no bytes to copy")
    if isinstance(source, ParquetFiles) and seed is not None:
        raise ValueError(
            f"{path} is read in groups of rows, shuffled each picture would cost a group: give --no-shuffle"
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
    }
    plan["labels"] = zlib.crc32(source.labels.tobytes())
    with _claimed(partial, plan), _bar() as bar:
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
        (partial / "classes.txt").write_text(classes, encoding="utf-8", errors="surrogateescape")
        os.rename(partial, dest)
        (dest / PLAN).unlink()
    return f"{len(source):,} images in {shards} shards: {dest}"


@contextmanager
def _claimed(folder: Path, plan: dict[str, object]) -> Iterator[None]:
    """The folder is this process's, new or left by an interrupted one with the same plan. Raises ValueError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    strangers = [entry for entry in os.scandir(folder) if entry.name != PLAN]
    with (folder / PLAN).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there") from None
        file.seek(0)
        before, now = file.read(), json.dumps(plan)
        if before != now and (before or strangers):
            raise ValueError(f"{folder} is not a part of this: {before or 'no plan'}, now {now}. Delete or rename it")
        if not before:
            file.write(now)
            file.flush()
            os.fsync(file.fileno())
        yield


def _write_shard(source: Source, samples: NDArray[np.int64], target: Path) -> None:
    """A tar of the encoded pictures and their labels, in this order; it appears whole or not at all."""
    temporary = target.with_name("." + target.name)
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in samples.tolist():
                try:
                    data = source.read(i)
                except UnreadableImage as error:
                    raise ValueError(f"{error}; `data verify SRC --out good.npz` makes an index without it") from error
                assert isinstance(data, bytes)
                key, ending = _member(source.name(i), i, data)
                _add(tar, key + ending, data)
                _add(tar, key + ".cls", str(source.labels[i]).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _member(name: str, i: int, data: bytes) -> tuple[str, str]:
    """Key and ending of a picture in a shard. WebDataset's keys have no dots, and must differ: hence the number."""
    stem, ending = os.path.splitext(name)
    if os.fsencode(ending.lower()) not in EXTENSIONS:
        stem = name
        kinds = [kind for magic, kind in MAGIC if re.match(magic, data, re.DOTALL)]
        if not kinds:
            raise ValueError(f"{name} is not a JPEG, PNG, WebP or BMP picture")
        ending = kinds[0]
    return f"{re.sub(r'[^-/0-9A-Za-z_]', '_', stem)}-{i}", ending


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _listing(source: Source) -> Listing:
    if not isinstance(source, Listing):
        raise ValueError("only folders of pictures, tar shards and Arrow files have an index; this opens without one")
    return source


def _check_new_index(path: Path) -> None:
    _refuse_existing(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the name of an index must end in .npz")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists: choose another name, nothing is overwritten")


def _bar() -> Progress:
    """On standard error, and only on a terminal: standard output is for the findings."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
