"""The folder of a run: configuration, metrics, checkpoints, results, report. Starting again in it continues it.

config.yaml         the resolved configuration
metrics.jsonl       one row per log point or evaluation
tensorboard/        the same for TensorBoard
wandb/              the same for Weights & Biases, if monitor.wandb is set
checkpoints/        see `trainer.run.checkpoint`
index-*.npz         listing of an image folder or of shards
unreadable-*.txt    samples that could not be read, per rank
results.json        what the finished run reached
stop                made by a user: training saves and stops
stopped.json        there if it did, or was told to by a signal or the clock
stacks-rank-*.txt   what a process that hung was doing
replay/             a step whose loss or gradient was not finite, see `trainer.ops.replay`
trace.json.gz       of the steps that run.profile asks for, for chrome://tracing or ui.perfetto.dev
report.html         see `trainer.report.run`
NAME/               an evaluation, see `trainer.evaluate.base`

An imported model's has config.yaml, weights.safetensors and imported.json (`trainer.interop.import_`).
"""

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from data.sources.open import Source, open_source
from trainer.config import Config, Data, dump, flatten, load
from trainer.distributed import RankInfo, raise_on_all_ranks

log = logging.getLogger(__name__)

POSITION = {"step", "epoch", "images", "seconds"}  # of a row of metrics.jsonl

Row = dict[str, Any]

IMPORTED = "imported.json"  # where an imported model is from

# What may change between two starts of a run, since it changes nothing that is learned.
# An engine changes roundings, as the number of ranks does.
FREE = (
    "run.dir",
    "run.device",
    "run.log_every",
    "run.save_every",
    "run.keep",  # and keep_every
    "run.profile",
    "run.max_minutes",
    "run.step_timeout",
    "run.long_timeout",
    "data.backend",
    "data.workers",
    "data.prefetch",
    "data.decoder.",
    "data.max_unreadable",
    "engine.",
    "eval.",
    "linear.",
    "fast.",
    "finetune.",
    "voc07.",
    "monitor.",
)


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def write_atomically(path: Path, text: str) -> None:
    """`path` has the old content or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def claim(config: Config, rank_info: RankInfo) -> Iterator[Path]:
    """The run's folder, made new or taken up from an earlier start of the same run, and kept from other processes.

    Raises ValueError, on all ranks, if it is that of another configuration, of something else, or in use.
    """
    with claimed(Path(config.run.dir), rank_info, lambda folder: _take(folder, config)) as folder:
        yield folder


@contextmanager
def claimed(folder: Path, rank_info: RankInfo, take: Callable[[Path], None]) -> Iterator[Path]:
    """The folder, kept from other processes; `take`, on rank 0, raises ValueError if it is of something else."""
    error = None
    with ExitStack() as stack:
        if rank_info.rank == 0:
            try:
                stack.enter_context(_lock(folder))
                take(folder)
            except (ValueError, OSError) as refusal:
                error = str(refusal)
        raise_on_all_ranks(error)
        yield folder


def _lock(folder: Path) -> IO[str]:
    """An open file that keeps other processes out of the folder until it is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is at work in {folder}") from error
    except OSError as error:
        what = "cannot be locked (flock)" if folder.is_dir() else "cannot be used"
        raise ValueError(f"{folder} {what}: {error.strerror}") from error
    return lock


def _take(folder: Path, config: Config) -> None:
    """Write the configuration into the folder. Raises ValueError where that of another run, or its files, are there."""
    stored = folder / "config.yaml"
    if (folder / IMPORTED).exists():
        raise ValueError(f"run.dir: {folder} holds an imported model. Choose another run.dir")
    if stored.exists():
        before, now = (flatten(c.model_dump(mode="json")) for c in (load(stored), config))
        changed = [k for k in before | now if before.get(k) != now.get(k) and not k.startswith(FREE)]
        if changed:
            listed = "; ".join(f"{k} was {before.get(k)}, now {now.get(k)}" for k in changed)
            raise ValueError(f"run.dir: {folder} holds another run: {listed}. Choose another run.dir")
    elif (folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists():
        raise ValueError(f"run.dir: {folder} has files of a run, but no config.yaml. Choose another run.dir")
    write_atomically(stored, dump(config))


def open_training(config: Config, folder: Path) -> Source:
    """The training images alone. Raises ValueError, on all ranks, where they are fewer than a batch, too."""
    train, _ = open_sources(config.data.model_copy(update={"val": None}), folder)
    check_batch(config, train)
    return train


def check_batch(config: Config, train: Source) -> None:
    """Raise ValueError where the training images are fewer than a batch."""
    if (batch := config.data.batch_size) > len(train):
        raise ValueError(f"data.batch_size: {batch} images are more than {config.data.train} has, {len(train)}")


def open_sources(data: Data, folder: Path) -> tuple[Source, Source | None]:
    """The training images and, if `data` names any, the validation images; their listings are kept in `folder`.

    Raises ValueError, on all ranks, if any rank cannot use them or finds other images than rank 0.
    """
    train, val = None, None
    for turn in (True, False):  # rank 0 lists millions of files, then the others read what it saved
        error = None
        try:
            if (dist.get_rank() == 0) == turn:
                train = open_source(data.train, folder / "index-train.npz")
                val = open_source(data.val, folder / "index-val.npz") if data.val else None
        except (ValueError, OSError) as refusal:
            error = f"data: {refusal}"
        raise_on_all_ranks(error)
    assert train is not None
    if val and (unknown := sorted(set(val.classes) - set(train.classes))):
        error = f"data.val: {data.val} has classes that {data.train} has not: {', '.join(unknown[:3])}"
    raise_on_all_ranks(error)
    for name, source in (("data.train", train), ("data.val", val)):
        if source:
            found = (len(source), len(source.classes), zlib.crc32(source.labels.tobytes()))
            first = [found]
            dist.broadcast_object_list(first)
            here, there = ("{} images in {} classes, checksum {:08x}".format(*x) for x in (found, first[0]))
            raise_on_all_ranks(None if found == first[0] else f"{name}: this rank finds {here}, rank 0 {there}")
    return train, val


class Unreadable:
    """The samples that could not be read, each listed once in a file of its rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"unreadable-{rank}.txt"
        listed = self.path.read_bytes().splitlines() if self.path.exists() else []
        self.samples = {int(line.split(b"\t")[0]) for line in listed}
        self.encountered: set[int] = set()  # since this start; of the other ranks as far as `check` has heard
        self.told = 0  # how many of them all ranks know

    def note(self, bad: list[tuple[int, str]]) -> None:
        for sample, reason in bad:
            self.encountered.add(sample)
            if sample not in self.samples:
                self.samples.add(sample)
                log.warning("sample %d cannot be read, another is used: %s", sample, reason)
                try:
                    # The reason has a file's name, which may hold any bytes and a line's end.
                    with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                        file.write(f"{sample}\t{' '.join(reason.split())}\n")
                except OSError as error:
                    log.warning("%s not written: %s", self.path, error)

    def total(self) -> int:
        """Over all ranks; a sample that two ranks met counts twice."""
        count = torch.tensor(len(self.samples))
        dist.all_reduce(count)
        return int(count)

    def check(self, seen: int, share: float) -> None:
        """Raise ValueError, on all ranks, if more than `share` of the `seen` images since this start are unreadable.

        Of fewer than 1000 images it is that share of 1000: a small number says little.
        """
        news = torch.tensor(len(self.encountered) - self.told)
        dist.all_reduce(news)
        if news > 0:
            everyones: list[set[int]] = [set()] * dist.get_world_size()
            dist.all_gather_object(everyones, self.encountered)
            self.encountered.update(*everyones)
            self.told = len(self.encountered)
        if len(self.encountered) > share * max(seen, 1000):
            raise ValueError(
                f"{len(self.encountered):,} of {seen:,} images cannot be read, more than data.max_unreadable={share:g} "
                f"allows; they are listed in {self.path.parent}/unreadable-*.txt"
            )


def read_config(folder: Path, overrides: list[str] | None = None) -> Config:
    """The configuration of the run in `folder`, with overrides. Raises ValueError if there is none."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run: it has no config.yaml")
    return load(folder / "config.yaml", overrides)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} if there is no such file."""
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of what the run in `folder` was evaluated by, by the names of their folders."""
    found = {path.parent.name: read_json(path.with_name("results.json")) for path in folder.glob("*/settings.json")}
    return {name: results for name, results in sorted(found.items()) if results}


def of_each_step(found: dict[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """`evaluations` by name without the step and by step, ascending: linear-step780 of step 780 is a linear."""
    grouped: dict[str, dict[int, dict[str, Any]]] = {}
    for name, results in sorted(found.items(), key=lambda item: item[1].get("step", 0)):
        step = results.get("step", 0)
        grouped.setdefault(name.removesuffix(f"-step{step}"), {})[step] = results
    return grouped


def evaluated_rows(rows: list[Row], found: dict[str, dict[str, Any]]) -> list[Row]:
    """Evaluations of several steps as rows of metrics.jsonl, their accuracy under their name.

    Epoch, images and seconds are those of `rows` around the step.
    """
    known = [row for row in rows if row.keys() >= POSITION]
    if not known:
        return []
    steps = [row["step"] for row in known]
    drawn = []
    for name, by_step in of_each_step(found).items():
        if len(by_step) > 1:
            for step, results in by_step.items():
                at = {key: float(np.interp(step, steps, [row[key] for row in known])) for key in POSITION}
                drawn.append({**at, "step": step, name: results["map" if "map" in results else "top1"]})
    return drawn


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, [] if there is none. A line cut short, by a kill while writing, is left out."""
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            log.warning("%s: a line is not JSON, left out: %.60s", path, text)
    return rows
