"""The benchmark of saving on a small run; times are not asserted."""

import json
from pathlib import Path

import pytest

from tests.trainer.small import small_config, write_images
from trainer.bench import save


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
