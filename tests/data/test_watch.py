"""The log lines while a run waits for data, and the end of workers whose trainer is gone."""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from data import watch
from data.loader import train_batches
from data.sources.base import UnreadableImage
from data.sources.folder import ImageFolder
from data.views import View
from data.watch import WatchedSource
from tests.data.images import write_folder
from tests.data.settings import CPU, data_settings


class Slow(ImageFolder):
    """A folder whose first file takes two seconds to read."""

    def read(self, i: int) -> bytes:
        if i == 0:
            time.sleep(2)
        return super().read(i)


@pytest.fixture
def slow(tmp_path: Path) -> ImageFolder:
    return Slow.scan(write_folder(tmp_path / "data", classes=1, per_class=8))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "data.watch"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_file_that_a_worker_is_reading_is_named(
    slow: ImageFolder, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.3)
    caplog.set_level(logging.WARNING)
    settings = data_settings(views=(View(size=16),), batch_size=4, workers=workers)
    batches = train_batches(slow, settings, 0, 0, 1, 0, 2, CPU)
    assert len(list(batches)) == 2
    named = [line for line in lines(caplog) if "c0/0.png" in line]
    assert named
    assert re.fullmatch(r"waiting for data for \d+ s; reading c0/0\.png \(for \d+ s\)", named[-1])


def test_no_log_lines_while_batches_arrive(
    slow: ImageFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 1.0)
    watched = WatchedSource(slow)

    def steps() -> Iterator[int]:
        for i in range(12):
            time.sleep(0.1)
            yield i

    for _ in watched.batches(steps()):
        time.sleep(0.1)  # the trainer's own work is not a wait for data
    for i in watched.batches(iter(range(2))):
        if i == 0:
            time.sleep(1.5)
    assert lines(caplog) == []


def test_slow_augmentation_is_distinguished(
    slow: ImageFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.2)

    def steps() -> Iterator[int]:
        while len(lines(caplog)) < 2 and time.monotonic() < start + 60:
            time.sleep(0.01)
        yield 0

    start = time.monotonic()
    assert list(WatchedSource(slow).batches(steps())) == [0]
    assert len(lines(caplog)) <= (time.monotonic() - start) / 0.2
    assert "no file is being read" in lines(caplog)[0]


def test_a_failed_read_is_not_active(slow: ImageFolder) -> None:
    watched = WatchedSource(slow)
    (slow.root / slow.name(1)).unlink()
    with pytest.raises(UnreadableImage):
        watched.read(1)
    assert watched.active_reads() == []


def test_threads_are_distinguished(slow: ImageFolder) -> None:
    watched = WatchedSource(slow)
    threads = [threading.Thread(target=watched.read, args=(0,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(watched.active_reads()) < 3 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    assert [name for _, name in watched.active_reads()] == ["c0/0.png"] * 3
    for thread in threads:
        thread.join()
    assert watched.active_reads() == []


def test_the_watching_thread_ends(slow: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.1)
    before = threading.active_count()
    whole, left = WatchedSource(slow).batches(iter(range(3))), WatchedSource(slow).batches(iter(range(3)))
    assert (list(whole), next(left)) == ([0, 1, 2], 0)
    assert threading.active_count() > before
    del left
    for _ in range(50):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError("a thread is left")


def test_a_workers_error_has_one_line(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", classes=1, per_class=4)
    source = ImageFolder.scan(root)
    for path in root.rglob("*.png"):
        path.unlink()
    for workers in (0, 1):
        settings = data_settings(views=(View(size=16),), batch_size=4, workers=workers)
        batches = train_batches(source, settings, 0, 0, 1, 0, 2, CPU)
        with pytest.raises(
            ValueError, match=r"\A4 images in a row cannot be read, the last is c0/\d\.png: No such[^\n]*\Z"
        ):
            next(batches)


LOADING = """
import sys, time
from pathlib import Path
from data.sources.open import open_source
from data.loader import train_batches
from data.views import View
from tests.data.settings import CPU, data_settings

if __name__ == "__main__":
    source = open_source(sys.argv[1], Path(sys.argv[1] + ".npz"))
    backend = sys.argv[2].replace("pil", "cpu")
    settings = data_settings(views=(View(size=16),), batch_size=4, workers=2, backend=backend)
    if sys.argv[2] == "pil":
        from trainer.bench import pil

        batches = pil.batches(source, settings, CPU)
    else:
        batches = train_batches(source, settings, 0, 0, 1, 0, 1000, CPU)
    next(batches)
    print("loading", flush=True)
    time.sleep(100)
"""


def descendants(process: int) -> set[int]:
    """Return all descendants of a process, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


@pytest.mark.parametrize("backend", ["cpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dali", "pil"))])
def test_workers_end_when_their_trainer_is_killed(tmp_path: Path, backend: str) -> None:
    root = write_folder(tmp_path / "data", classes=1, per_class=8)
    script = tmp_path / "load.py"
    script.write_text(LOADING)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    trainer = subprocess.Popen(
        [sys.executable, script, root, backend], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "loading\n"
    workers = descendants(trainer.pid)
    assert len(workers) >= 3, "two workers and the fork server"
    trainer.kill()
    trainer.wait()
    for _ in range(300):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {[w for w in workers if Path(f'/proc/{w}').exists()]}")
