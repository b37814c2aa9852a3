"""Trackers: rows in the formats of TensorBoard, Weights & Biases and Prometheus."""

import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from prometheus_client.parser import text_string_to_metric_families
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from tests.trainer.small import small_config
from trainer.config import MonitorSettings
from trainer.config_file import dump
from trainer.run.console import curve
from trainer.run.metrics import MetricsLogger
from trainer.run.results import read_rows

ROW = {
    "epoch": 1,
    "images": 640,
    "loss": 5.5,
    "images_per_second": 10.0,
    "phases": {"data": {"seconds": 0.5, "rank": 0}},
}


def record(folder: Path, start: int, settings: MonitorSettings, *steps: int) -> None:
    with MetricsLogger(folder, start, 100, settings, active=True) as metrics_logger:
        for step in steps:
            metrics_logger.log({"step": step, **ROW})


def test_prometheus(tmp_path: Path, group: None) -> None:
    path = tmp_path / "run.prom"
    record(tmp_path, 0, MonitorSettings(prometheus=str(path)), 10, 20)
    found = {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert found["adco_step"] == (20, {"run": str(tmp_path)})
    assert found["adco_loss"][0] == 5.5
    assert found["adco_phases_data_seconds"][0] == 0.5
    assert [each.name for each in tmp_path.glob("run.prom*")] == ["run.prom"]


def test_a_tracker_that_fails_is_dropped(tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture) -> None:
    record(tmp_path, 0, MonitorSettings(prometheus=str(tmp_path / "nowhere" / "run.prom")), 10, 20)
    assert caplog.text.count("Prometheus gets no more rows until the next start") == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10, 20]


def test_tensorboard_on_a_full_disk(
    tmp_path: Path, group: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its thread writes, and its error is one line of the log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLogger(tmp_path, 0, 10_000, MonitorSettings(), active=True) as metrics_logger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            for step in range(1, 10_000):
                metrics_logger.log({"step": step, **ROW})
                if not metrics_logger.trackers:
                    break
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics_logger.log({"step": 10_000, **ROW})
    assert caplog.text.count("TensorBoard gets no more rows until the next start: [Errno 27] File too large") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["step"] == 10_000


def records(path: Path) -> Iterator[bytes]:
    """Read the records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            yield record
            record = b""


def wandb_rows(folder: Path, count: int) -> list[dict[str, str]]:
    """Read the history from the files of offline runs; waits until W&B's own process has written `count` rows."""
    end = time.monotonic() + 30
    while True:
        rows = []
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
            for data in records(path):
                record = Record.FromString(data)
                if record.HasField("history"):
                    rows.append(
                        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    )
        if len(rows) >= count or time.monotonic() > end:
            return rows
        time.sleep(0.1)


def test_weights_and_biases_offline(tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.yaml").write_text(dump(small_config(tmp_path, tmp_path)))
    settings = MonitorSettings(tensorboard=False, wandb="project")
    record(tmp_path, 0, settings, 10, 20)
    first = (tmp_path / "wandb" / "id").read_text()
    record(tmp_path, 20, settings, 30)
    rows = wandb_rows(tmp_path, 3)
    assert [row["step"] for row in rows] == ["10", "20", "30"]
    assert {row["loss"] for row in rows} == {"5.5"}
    assert {row["phases/data/seconds"] for row in rows} == {"0.5"}
    assert (tmp_path / "wandb" / "id").read_text() == first
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{first}"))) >= 1
    assert not (tmp_path / "tensorboard").exists()


def test_without_a_network_training_goes_on(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("timed out")

    monkeypatch.setattr(wandb, "init", refuse)
    (tmp_path / "config.yaml").write_text(dump(small_config(tmp_path, tmp_path)))
    record(tmp_path, 0, MonitorSettings(wandb="project"), 10)
    assert "Weights & Biases is not available: timed out" in caplog.text
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10]


def test_a_curve() -> None:
    assert curve([3, 2, 1]) == "█▅▁"
    assert curve([1, 1]) == "▁▁"
