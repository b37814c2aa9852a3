"""The training loop: the order of its parts, when each is due, resuming, stopping and failing."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from trainer import loop
from trainer.config import MonitorSettings, Run
from trainer.distributed import RankInfo
from trainer.engines.finite import NotFinite, StepResult
from trainer.loop import LoopSettings, train
from trainer.ops.stop import Stopped
from trainer.run import checkpoint
from trainer.run.phases import PhaseTimer
from trainer.run.results import Row

RANK_INFO = RankInfo(torch.device("cpu"), 0, 1, 1)


class Counter:
    """A task that counts its steps and records what the loop asks for."""

    def __init__(self, folder: Path, stop_at: int = 0, fail_at: int = 0, infinite_at: int = 0) -> None:
        self.folder, self.stop_at, self.fail_at, self.infinite_at = folder, stop_at, fail_at, infinite_at
        self.phases, self.flops = PhaseTimer(RANK_INFO.device), 0.0
        self.count = torch.zeros(())
        self.events: list[str] = []
        self.checked: list[tuple[int, str]] = []  # checked steps with the last event before

    def step(self, batch: Batch, step: int) -> StepResult:
        assert int(batch.samples) == step
        self.events.append(f"step {step}")
        self.count += 0 < step < (self.fail_at or 99)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        loss = torch.tensor(float("inf") if step == self.infinite_at else float(step))
        return StepResult({"loss": loss}, lambda: self.check(step))

    def check(self, step: int) -> None:
        self.checked.append((step, self.events[-1]))
        if step == self.fail_at:
            raise NotFinite([0], float("nan"))

    def log_values(self, step: int, averages: dict[str, float]) -> dict[str, float]:
        self.events.append(f"log {step}")
        return {"extra": 2.0 * step}

    def describe_failure(self, error: NotFinite, batch: Batch, step: int) -> str:
        return f"advice for {int(batch.samples)}"

    def state(self, step: int) -> dict[str, Any]:
        self.events.append(f"save {step}")
        return {"task": {"count": self.count}, "step": torch.tensor(step)}

    def evaluate(self, step: int) -> Row:
        self.events.append("evaluate")
        return {"knn": float(self.count)}


def settings_for(folder: Path, **changes: Any) -> LoopSettings:
    """12 steps in epochs of 4; rows every 3 steps, checkpoints every 5, evaluations every 4."""
    values: dict[str, Any] = {
        "run_folder": folder,
        "folder": folder,
        "stop_folder": folder,
        "process_start": 0.0,
        "steps": 12,
        "steps_per_epoch": 4,
        "batch_size": 8,
        "num_images": 32,
        "max_unreadable": 0.01,
        "save_every": 5,
        "keep": 1,
        "keep_every": 0,
        "evaluate_every": 4,
        "run": Run(dir=str(folder), epochs=3, log_every=3),
        "trackers": MonitorSettings(tensorboard=False),
    }
    return LoopSettings(**{**values, **changes})


def batches(start: int, bad: list[tuple[int, str]] | None = None) -> Iterator[Batch]:
    for step in range(start + 1, 13):
        yield Batch([], torch.tensor([step]), bad or [])


def rows(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Littering(Counter):
    """A task that leaves reference cycles, so that Python would collect them within a step."""

    def step(self, batch: Batch, step: int) -> StepResult:
        for _ in range(30_000):
            cycle: list[Any] = []
            cycle.append(cycle)
        return super().step(batch, step)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("stop_at", [0, 9])
def test_garbage_is_collected_at_chosen_steps(stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "COLLECT_EVERY", 4)
    task, collected = Littering(tmp_path, fail_at=stop_at), []

    def record(phase: str, info: dict[str, int]) -> None:
        # Collections before the first step are those of the set-up.
        if phase == "stop" and task.count and not gc.isenabled():
            collected.append((int(task.count), info["collected"] > 30_000))

    gc.callbacks.append(record)
    try:
        train(task, batches(0), 0, settings_for(tmp_path), RANK_INFO)
    except ValueError:
        assert stop_at
    finally:
        gc.callbacks.remove(record)
    assert collected == [(4, True), (8, True)] + [(12, True)] * (not stop_at)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("group")
def test_fetch_step_log_save_evaluate(tmp_path: Path) -> None:
    task = Counter(tmp_path)
    seconds = train(task, batches(0), 0, settings_for(tmp_path), RANK_INFO)
    expected = ["evaluate"]
    for step in range(1, 13):
        expected.append(f"step {step}")
        if step in (3, 5, 6, 9, 10, 12):  # every third step, every checkpoint, the last step
            expected.append(f"log {step}")
        if step in (5, 10, 12):
            expected.append(f"save {step}")
        if step in (4, 8, 12):
            expected.append("evaluate")
    assert task.events == expected
    assert seconds > 0
    logged = [(row["step"], row["loss"], row["extra"]) for row in rows(tmp_path) if "loss" in row]
    assert logged == [(3, 2.0, 6.0), (5, 4.5, 10.0), (6, 6.0, 12.0), (9, 8.0, 18.0), (10, 10.0, 20.0), (12, 11.5, 24.0)]
    assert [(row["step"], row["epoch"], row["knn"]) for row in rows(tmp_path) if "knn" in row] == [
        (0, 0, 0), (4, 1, 4), (8, 2, 8), (12, 3, 12),
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.usefixtures("group")
def test_a_step_is_checked_when_the_next_has_begun_or_something_is_due(tmp_path: Path) -> None:
    """Rows are due at 3, 5, 6, 9, 10 and 12, evaluations at 4, 8 and 12."""
    task = Counter(tmp_path)
    train(task, batches(0), 0, settings_for(tmp_path), RANK_INFO)
    due = (3, 4, 5, 6, 8, 9, 10, 12)
    assert task.checked == [(step, f"step {step if step in due else step + 1}") for step in range(1, 13)]


@pytest.mark.parametrize("fail_at", [1, 3, 4, 5, 7, 8, 12])
@pytest.mark.usefixtures("group")
def test_a_failed_step_is_neither_logged_nor_saved_nor_evaluated(tmp_path: Path, fail_at: int) -> None:
    task = Counter(tmp_path, fail_at=fail_at)
    with pytest.raises(
        ValueError, match=rf"^step {fail_at}: not finite: the loss on rank 0, .*; advice for {fail_at}$"
    ):
        train(task, batches(0), 0, settings_for(tmp_path), RANK_INFO)
    after = task.events[task.events.index(f"step {fail_at}") + 1 :]
    assert after in ([], [f"step {fail_at + 1}"]), "the device may already compute the next step"
    assert all(row["step"] < fail_at for row in rows(tmp_path))


@pytest.mark.usefixtures("group")
def test_a_failed_step_is_found_before_the_checkpoint_of_a_stop(tmp_path: Path) -> None:
    task = Counter(tmp_path, stop_at=7, fail_at=7)
    with pytest.raises(ValueError, match=r"^step 7: not finite"):
        train(task, batches(0), 0, settings_for(tmp_path), RANK_INFO)
    assert "save 7" not in task.events


@pytest.mark.usefixtures("group")
def test_a_stopped_training_resumes_and_logs_the_same(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    train(Counter(whole), batches(0), 0, settings_for(whole), RANK_INFO)
    with pytest.raises(Stopped):
        train(Counter(cut, stop_at=6), batches(0), 0, settings_for(cut), RANK_INFO)
    saved = checkpoint.newest(cut / "checkpoints")
    assert saved
    task = Counter(cut)
    state = task.state(0)
    checkpoint.load(saved, state)
    start = int(state["step"])
    assert 6 <= start < 12
    assert int(task.count) == start
    train(task, batches(start), start, settings_for(cut), RANK_INFO)
    assert int(task.count) == 12
    own = {row["step"] for row in rows(cut)} - {row["step"] for row in rows(whole)}
    assert own <= {start}, "a row at the stop, so that no step is missing in the log"
    columns = ("step", "knn", "extra")
    resumed = [[row.get(name) for name in columns] for row in rows(cut) if row["step"] not in own]
    assert resumed == [[row.get(name) for name in columns] for row in rows(whole)]
    for folder in (whole, cut):
        ends = [0, *(row["step"] for row in rows(folder) if "loss" in row)]
        losses = [row["loss"] for row in rows(folder) if "loss" in row]
        assert sum(x * (b - a) for x, (a, b) in zip(losses, pairwise(ends), strict=True)) == sum(range(13))


@pytest.mark.usefixtures("group")
def test_an_evaluation_that_was_missed_is_made_up_for(tmp_path: Path) -> None:
    task = Counter(tmp_path)
    task.count += 8
    train(task, batches(8), 8, settings_for(tmp_path), RANK_INFO)
    assert task.events[:2] == ["evaluate", "step 9"]


@pytest.mark.usefixtures("group")
def test_without_evaluation(tmp_path: Path) -> None:
    never, ends = Counter(tmp_path / "never"), Counter(tmp_path / "ends")
    for task, every in ((never, None), (ends, 0)):
        task.folder.mkdir()
        train(task, batches(0), 0, settings_for(task.folder, evaluate_every=every), RANK_INFO)
    assert (never.events.count("evaluate"), ends.events.count("evaluate")) == (0, 2)


@pytest.mark.usefixtures("group")
def test_checkpoints_that_are_kept(tmp_path: Path) -> None:
    train(Counter(tmp_path), batches(0), 0, settings_for(tmp_path, keep_every=4), RANK_INFO)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008", "step-00000012"]
    assert {4, 8, 12} <= {row["step"] for row in rows(tmp_path) if "loss" in row}


@pytest.mark.usefixtures("group")
def test_failures_name_the_step_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^step 7: not finite: the loss on rank 0, .*; advice for 7$"):
        train(Counter(tmp_path, fail_at=7), batches(0), 0, settings_for(tmp_path), RANK_INFO)
    with pytest.raises(ValueError, match=r"^step 9: not finite: \{'loss': inf\}; .* lower learning rate"):
        train(Counter(tmp_path, infinite_at=8), batches(0), 0, settings_for(tmp_path), RANK_INFO)
    bad = [(number, f"{number}.jpg: damaged") for number in range(11)]
    with pytest.raises(ValueError, match=r"11 of 24 images cannot be read"):
        train(Counter(tmp_path), batches(0, bad), 0, settings_for(tmp_path), RANK_INFO)
