"""Trackers: rows in the formats of TensorBoard, Weights & Biases and Prometheus."""

import re
import resource
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from tests.trainer.small import PYTHON, small_config
from trainer.config import MonitorSettings
from trainer.config_file import dump
from trainer.run import trackers
from trainer.run.console import curve
from trainer.run.metrics import MetricsLogger
from trainer.run.results import read_rows

ROOT = Path(__file__).parents[2]
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
    """Read the history from the files of runs; waits until W&B's own process has written `count` rows."""
    end = time.monotonic() + 30
    while True:
        rows = []
        for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
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


class FakeRun:
    """A run of W&B whose method `failing` raises `error`."""

    def __init__(self, failing: str, error: Exception) -> None:
        self.failing, self.error = failing, error

    def define_metric(self, *_: object, **__: object) -> None:
        self.fail_in("define_metric")

    def log(self, _: object) -> None:
        self.fail_in("log")

    def finish(self) -> None:
        self.fail_in("finish")

    def fail_in(self, method: str) -> None:
        if method == self.failing:
            raise self.error


@pytest.mark.parametrize(
    ("failing", "error", "warning"),
    [
        ("define_metric", MailboxClosedError(), "Weights & Biases is not available: MailboxClosedError"),
        ("log", wandb.Error("gone"), "Weights & Biases gets no more rows until the next start: gone"),
        ("log", ConnectionResetError("lost"), "Weights & Biases gets no more rows until the next start: lost"),
        ("finish", TimeoutError("late"), "the last rows were not written to Weights & Biases: late"),
        ("finish", MailboxClosedError(), "the last rows were not written to Weights & Biases: MailboxClosedError"),
        ("finish", HandleAbandonedError(), "the last rows were not written to Weights & Biases: HandleAbandonedError"),
    ],
)
def test_errors_of_weights_and_biases_are_warnings(
    tmp_path: Path,
    group: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
    error: Exception,
    warning: str,
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(failing, error))
    (tmp_path / "config.yaml").write_text(dump(small_config(tmp_path, tmp_path)))
    record(tmp_path, 0, MonitorSettings(wandb="project"), 10)
    assert warning in caplog.text
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10]


def test_an_error_that_is_not_of_weights_and_biases_is_raised(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun("log", TypeError("a wrong argument")))
    (tmp_path / "config.yaml").write_text(dump(small_config(tmp_path, tmp_path)))
    with pytest.raises(TypeError, match="a wrong argument"):
        record(tmp_path, 0, MonitorSettings(wandb="project"), 10)


LOST_NETWORK = """
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from trainer.run import trackers

lost = threading.Event()

class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        query = self.rfile.read(int(self.headers["content-length"]))
        if lost.is_set():
            time.sleep(600)
        data = {"model": None}
        if b"UpsertBucket" in query:
            project = {"id": "1", "name": "project", "entity": {"id": "1", "name": "me"}}
            data = {"upsertBucket": {"bucket": {"id": "1", "name": "run", "project": project}, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": 40 * "a"}
trackers.FINISH_SECONDS = 2
tracker = trackers.WeightsAndBiases(Path(sys.argv[1]), "project")
lost.set()
tracker.add(1, {"loss": 1.0})
began = time.monotonic()
try:
    tracker.close()
except OSError as error:
    print(error, round(time.monotonic() - began))
"""


@pytest.mark.slow
def test_a_network_that_is_lost_during_training(tmp_path: Path) -> None:
    """The last rows stay on the disk, for `wandb sync`."""
    (tmp_path / "config.yaml").write_text(dump(small_config(tmp_path, tmp_path)))
    command = [PYTHON, "-c", LOST_NETWORK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert re.match(r"Timed out finishing run. [2-9]$", done.stdout), done.stderr
    assert [row["loss"] for row in wandb_rows(tmp_path, 1)] == ["1"]


def test_results_of_an_evaluation_hide_no_step_of_its_curve(tmp_path: Path) -> None:
    curve_of_training = trackers.TensorBoard(tmp_path, 0)
    curve_of_training.add(5, {"loss": 1.0})
    curve_of_training.close()
    trackers.log_results(MonitorSettings(), tmp_path, tmp_path, 0, {"top1": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [5]


def test_a_curve() -> None:
    assert curve([3, 2, 1]) == "█▅▁"
    assert curve([1, 1]) == "▁▁"
