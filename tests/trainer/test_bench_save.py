"""The benchmark of saving on a small run; times are not asserted."""

import json
from pathlib import Path

import pytest

from tests.trainer.small import small_config, write_images
from tests.trainer.test_cuda_graph import CPU, CpuGraph
from trainer.bench import save
from trainer.run.checkpoint import Saver
from trainer.train_step import TrainStep


def test_cost_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A bank that takes longer to write than a step of this network.
    sections = {"bank": {"size": 100_000, "init": "random"}, "model": {"backbone_args": {}, "dim": 64}}
    config = small_config(tmp_path / "run", write_images(tmp_path / "images"), **sections)
    result = save.run(config, tmp_path, saves=1)
    bank, networks = 2 * 4 * 100_000 * 64, 11e6 * 4  # weights and velocity; student, teacher, momentum, weights again
    assert result["checkpoint_bytes"] == pytest.approx(bank + 5 * networks, rel=0.1)
    assert result["steps"] > 0
    assert result["ratio"] == pytest.approx(result["beside_seconds"] / result["step_seconds"])
    assert result["save_seconds"] > result["copy_seconds"] > 0
    assert not list(tmp_path.glob("tmp*")), "temporary files remain"
    save.report(result, tmp_path / "save.json")
    assert json.loads((tmp_path / "save.json").read_text()) == result
    assert "step beside it" in capsys.readouterr().out


def test_the_warm_up_includes_the_capture_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[CpuGraph] = []

    def make_graph(train_step: TrainStep, _: object) -> CpuGraph:
        graphs.append(CpuGraph(CPU, train_step.phases, train_step._discard))
        return graphs[-1]

    def start(saver: Saver, *_: object) -> None:
        raise InterruptedError(f"a save begins after {graphs[0].steps} steps and {graphs[0].captures} captures")

    monkeypatch.setattr(TrainStep, "_make_graph", make_graph)
    monkeypatch.setattr(Saver, "start", start)
    with pytest.raises(InterruptedError, match="after 13 steps and 1 captures"):
        save.run(small_config(tmp_path / "run", tmp_path / "none"), tmp_path, saves=1)
