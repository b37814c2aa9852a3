"""Metrics: averages over ranks, rows in files and on the console, also when the disk is full."""

import io
import json
import logging
import math
import re
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.ranks import run_ranks
from trainer.config import MonitorSettings
from trainer.run.metrics import Averages, MetricsLogger, peak_memory, set_up_logging
from trainer.run.results import Row, read_rows


def row(step: int) -> Row:
    learned = {"loss": 8 - step / 10, "pretext_top1": 0.5}
    speed = {"images_per_second": 1234.5, "phases": {"data": {"seconds": step / 100, "rank": 0}}}
    return {"step": step, "epoch": step / 10, "images": 100 * step, **learned, **speed}


def evaluation(step: int) -> Row:
    return {"step": step, "epoch": step / 10, "images": 100 * step, "knn": 0.8125}


def record(folder: Path, start: int, rows: list[Row]) -> MetricsLogger:
    with MetricsLogger(folder, start, 100, MonitorSettings(), active=True) as metrics_logger:
        for each in rows:
            metrics_logger.log(each)
    return metrics_logger


def tensorboard(folder: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def average() -> list[dict[str, float]]:
    rank = dist.get_rank()
    averages, taken = Averages(), []
    for values in ([1.0, 3.0], [10.0]):
        for value in values:
            averages.add({"a": torch.tensor(value + rank), "b": torch.tensor(rank)})
        taken.append(averages.pop())
    return taken


def test_averages_over_steps_and_ranks() -> None:
    for taken in run_ranks(2, average):
        assert taken == [{"a": 2.5, "b": 0.5}, {"a": 10.5, "b": 0.5}]


def average_a_failure() -> dict[str, float]:
    averages = Averages()
    averages.add({"a": torch.tensor(math.nan if dist.get_rank() else 1.0)})
    return averages.pop()


def test_one_rank_that_is_not_finite_shows_on_all() -> None:
    for taken in run_ranks(2, average_a_failure):
        assert math.isnan(taken["a"])


def test_rows_go_to_both_files(tmp_path: Path, group: None) -> None:
    record(tmp_path, 0, [evaluation(0), row(10), row(20)])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [{**each, "seconds": None} for each in rows] == [
        {**each, "seconds": None} for each in (evaluation(0), row(10), row(20))
    ]
    assert tensorboard(tmp_path, "loss") == {10: 7, 20: 6}
    assert tensorboard(tmp_path, "knn") == {0: 0.8125}
    assert tensorboard(tmp_path, "phases/data/seconds") == pytest.approx({10: 0.1, 20: 0.2})


def test_resuming_drops_later_rows_and_keeps_the_time(tmp_path: Path, group: None) -> None:
    record(tmp_path, 0, [evaluation(0), row(10), row(20), row(30), evaluation(30)])
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({**each, "seconds": 100 + each["step"]}) + "\n" for each in read_rows(path)))

    metrics_logger = record(tmp_path, 20, [row(25)])
    assert steps(tmp_path) == [0, 10, 20, 25]
    assert metrics_logger.evaluated_steps == {0}
    assert 120 <= read_rows(path)[-1]["seconds"] < 180
    assert list(tensorboard(tmp_path, "loss")) == [10, 20, 25]


def test_starting_over_drops_all_but_the_first_evaluation(tmp_path: Path, group: None) -> None:
    record(tmp_path, 0, [evaluation(0), row(10), row(20)])
    metrics_logger = record(tmp_path, 0, [row(15)])
    assert metrics_logger.evaluated_steps == {0}
    assert steps(tmp_path) == [0, 15]
    assert list(tensorboard(tmp_path, "loss")) == [15]


def test_a_line_cut_short_by_a_kill_does_not_spoil_the_next(tmp_path: Path, group: None) -> None:
    record(tmp_path, 0, [row(10)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    record(tmp_path, 10, [row(20)])
    assert steps(tmp_path) == [10, 20]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def record_on_all_ranks(folder: Path) -> tuple[set[int], bool]:
    with MetricsLogger(folder, 10, 100, MonitorSettings(), active=dist.get_rank() == 0) as metrics_logger:
        metrics_logger.log(row(20))
        metrics_logger.advance(20)
        metrics_logger.print("once")
    return metrics_logger.evaluated_steps, metrics_logger.seconds > 5


def test_only_one_rank_writes_and_all_know_what_was_there(tmp_path: Path) -> None:
    rows = [{**row(10), "seconds": 5}, {**evaluation(10), "seconds": 6}, {**row(20), "seconds": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert run_ranks(2, record_on_all_ranks, tmp_path) == [({10}, True)] * 2
    assert steps(tmp_path) == [10, 10, 20]


def test_lines_where_there_is_no_terminal(tmp_path: Path, group: None, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, 20, 100, MonitorSettings(), active=True) as metrics_logger:
        metrics_logger.advance(60)
        metrics_logger.log({**row(60), "images": 60 * 2468, "images_per_second": 1234.0})
        metrics_logger.log(evaluation(60))
    line, knn = capsys.readouterr().out.splitlines()
    assert line == "step 60/100  epoch 6.00  loss 2.000  pretext 0.500  1,234 img/s  left 0:01:20"
    assert knn == "epoch 6: kNN 0.8125"


def test_a_dashboard_on_a_terminal(tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=150)
    monkeypatch.setattr("trainer.run.metrics.Console", lambda **_: terminal)
    with MetricsLogger(tmp_path, 0, 100, MonitorSettings(), active=True) as metrics_logger:
        metrics_logger.log(evaluation(0))
        metrics_logger.log(row(10))
        metrics_logger.advance(60)
        metrics_logger.log(row(60))
        metrics_logger.print("[red] is a word")
    shown = screen.getvalue()
    assert "[red] is a word" in shown
    newest = re.sub(r"\x1b\[[^m]*[A-Za-z]", "", shown[shown.rindex("60/100") :])
    for text in (
        "loss   2.000  █▁",
        "kNN    0.8125 after epoch 0",
        "speed  1,234 images/s",
        "step   data 100%",
        "stats ",
    ):
        assert text in newest


def test_warnings_appear_above_the_dashboard(tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that keeps the stderr from before would write into the dashboard, which erases it."""
    screen, before = Screen(), Screen()
    monkeypatch.setattr("trainer.run.metrics.Console", lambda **_: Console(file=screen, force_terminal=True, width=150))
    monkeypatch.setattr("sys.stderr", before)
    set_up_logging(0)
    with MetricsLogger(tmp_path, 0, 100, MonitorSettings(), active=True) as metrics_logger:
        metrics_logger.log(row(10))
        logging.getLogger("trainer.run").warning("the disk is full")
    assert "the disk is full" in screen.getvalue()
    assert before.getvalue() == ""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_that_cannot_be_written(
    tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with MetricsLogger(tmp_path, 0, 100, MonitorSettings(), active=True) as metrics_logger:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            metrics_logger.log(row(10))
        metrics_logger.log(row(20))
    assert "metrics of step 10 not written: [Errno 28] No space left on device" in caplog.text
    assert steps(tmp_path) == [10, 20], "written with the next row"
    assert list(tensorboard(tmp_path, "loss")) == [10, 20]


def fill_disk(folder: Path) -> bool:
    """Log while no file can grow beyond a few rows, then without that limit."""
    logging.getLogger("trainer.run.metrics").disabled = True
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLogger(folder, 0, 100, MonitorSettings(), active=True) as metrics_logger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        for step in range(1, 60):
            metrics_logger.log(row(step))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        metrics_logger.log(row(60))
    return not metrics_logger.trackers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    (gave_up,) = run_ranks(1, fill_disk, tmp_path)
    assert gave_up
    assert steps(tmp_path) == list(range(1, 61)), "rows that did not fit were written when there was space"


def test_peak_memory() -> None:
    assert 0.05 < peak_memory(torch.device("cpu"))["memory_gib"] < 1000


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    assert peak_memory(torch.device("cuda")) == {"memory_gib": 3, "reserved_gib": 5}
