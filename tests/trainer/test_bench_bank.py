"""The benchmark of a large bank on a small one; times are not asserted."""

import json
from pathlib import Path

import pytest

from trainer.bench import bank


@pytest.mark.parametrize(("velocity", "bytes_per_number"), [("fp32", 4 + 4 + 2), ("none", 4 + 2)])
def test_seconds_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], velocity: str, bytes_per_number: int
) -> None:
    result = bank.run(8, 1000, 16, "bf16", "fp32", velocity, steps=2)
    assert len(result["score_seconds"]) == len(result["adversary_seconds"]) == 2
    assert result["bank_bytes"] == 1000 * 16 * bytes_per_number
    bank.report(result, tmp_path / "bank.json")
    assert json.loads((tmp_path / "bank.json").read_text()) == result
    assert "storing N x K tensors would take" in capsys.readouterr().out
