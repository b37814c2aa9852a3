"""The benchmark of throughput on a small run: what it measures and writes; times are not asserted."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.batch import Batch
from data.settings import DataSettings
from data.sources.base import Source
from tests.processes import start_ranks, trainer
from tests.trainer.small import small_config, write_images
from tests.trainer.test_cuda_graph import CPU, CpuGraph
from trainer.bench import throughput
from trainer.config_file import dump
from trainer.plan.flops import step_flops
from trainer.train_step import TrainStep


def test_each_mode_measures_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path / "run", write_images(tmp_path / "images"))
    result = throughput.run(config, throughput.MODES, steps=4, warmup=1)
    full, synthetic, data = (result["modes"][mode] for mode in ("full", "synthetic", "data"))
    for figures in (full, synthetic, data):
        assert figures["images_per_second"] == pytest.approx(12 / figures["step_seconds"])
        assert figures["step_seconds_10"] <= figures["step_seconds_50"] <= figures["step_seconds_90"]
    assert list(data["phases"]) == ["data", "normalize"]
    assert list(full["phases"])[:4] == ["data", "normalize", "teacher", "student"]
    assert full["phases"]["data"]["seconds"] > 10 * synthetic["phases"]["data"]["seconds"]
    assert full["teraflops"] * 1e12 * full["step_seconds"] == pytest.approx(step_flops(config))
    assert "teraflops" not in data
    assert "communication" not in full, "one rank has no collectives"
    throughput.report(result, tmp_path / "out/one.json")
    assert json.loads((tmp_path / "out/one.json").read_text()) == result
    assert "images/s a rank" in capsys.readouterr().out


def test_waiting_for_a_burst_of_batches_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four workers that have two batches each ready at first, and then deliver four batches every 0.2 seconds."""
    real = throughput.train_batches

    def train_batches(source: Source, settings: DataSettings, *args: Any) -> Iterator[Batch]:
        for number, batch in enumerate(real(source, settings.model_copy(update={"workers": 0}), *args)):
            if number >= 8 and number % 4 == 0:
                time.sleep(0.2)
            yield batch

    monkeypatch.setattr(throughput, "train_batches", train_batches)
    config = small_config(tmp_path / "run", write_images(tmp_path / "images"), data={"workers": 4})
    result = throughput.run(config, ("data",), steps=7, warmup=1)
    assert result["steps"] == 8
    assert result["warmup"] >= 8
    figures = result["modes"]["data"]
    assert figures["step_seconds_50"] < 0.05 < figures["step_seconds"]
    assert figures["images_per_second"] <= 4 * 12 / 0.2
    assert figures["data_wait"] > 0.5


def test_the_warm_up_includes_the_capture_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep, "_make_graph", lambda step, _: CpuGraph(CPU, step.phases, step._discard))
    result = throughput.run(small_config(tmp_path / "run", tmp_path / "none"), ("synthetic",), steps=3, warmup=1)
    assert list(result["modes"]["synthetic"]["phases"]) == ["data", "normalize", "graph"]


def test_two_ranks_without_any_data(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", Path("/no/such/folder"))
    (tmp_path / "run.yaml").write_text(dump(config))
    options = ["--mode", "synthetic", "--steps", "3", "--warmup", "1", "--out", str(tmp_path / "two.json")]
    ranks = start_ranks(2, trainer, "bench", "throughput", tmp_path / "run.yaml", *options)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].errors
    assert ranks[0].output.count("images/s a rank") == 1
    assert ranks[1].output == ""
    result = json.loads((tmp_path / "two.json").read_text())
    assert (result["ranks"], result["nodes"]) == (2, 1)
    figures = result["modes"]["synthetic"]
    assert figures["images_per_second_per_rank"] == pytest.approx(figures["images_per_second"] / 2)
    assert figures["communication"] > 0
    assert {"slowest", "rank"} <= figures["phases"]["backward"].keys()


def write_result(path: Path, seconds: float, **facts: Any) -> Path:
    figures = {"step_seconds": seconds, "phases": {"data": {"seconds": seconds / 4}, "gone": {"seconds": 1.0}}}
    path.write_text(json.dumps({"engine": "ddp", **facts, "modes": {"full": figures}}))
    return path


def test_two_results_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_result(tmp_path / "before.json", 0.2)
    throughput.compare(before, write_result(tmp_path / "after.json", 0.1, engine="fsdp"))
    printed = capsys.readouterr().out
    assert "engine: ddp → fsdp" in printed
    assert [line.split() for line in printed.splitlines() if line.split()[:1] == ["step"]] == [
        ["step", "200.0", "ms", "100.0", "ms", "0.50"]
    ]
    assert "50.0 ms" in printed
    other = tmp_path / "other.json"
    for text, problem in (
        ("{}", "not a file of bench throughput"),
        ("[1]", "need a JSON object"),
        ("step", "not JSON"),
    ):
        other.write_text(text)
        with pytest.raises(ValueError, match=f"other.json: {problem}"):
            throughput.compare(before, other)


def test_overlapping_collectives_count_once() -> None:
    assert throughput._union_length([(5, 6), (0, 2), (1, 3), (2, 2.5)]) == 4
