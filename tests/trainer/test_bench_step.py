"""The benchmark of a training step on a small run; times are not asserted."""

import json
from pathlib import Path

import pytest

from tests.trainer.small import small_config
from tests.trainer.test_cuda_graph import CPU, CpuGraph
from trainer.bench import step
from trainer.train_step import TrainStep


def test_a_step_and_its_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path / "run", tmp_path / "none", optim={"accumulate": 2})
    result = step.run(config, repeats=2)
    assert result["step_seconds"] > 0
    assert result["overhead"] == pytest.approx(result["step_seconds"] / result["bare_seconds"] - 1)
    assert sum(result["phases"].values()) == pytest.approx(1)
    assert all(share > 0 for share in result["phases"].values()), result["phases"]
    step.report(result, tmp_path / "out/step.json")
    assert json.loads((tmp_path / "out/step.json").read_text()) == result
    assert "bare networks" in capsys.readouterr().out


def test_the_warm_up_includes_the_capture_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep, "_make_graph", lambda step, _: CpuGraph(CPU, step.phases, step._discard))
    assert list(step.run(small_config(tmp_path / "run", tmp_path / "none"), repeats=2)["phases"]) == ["graph"]
