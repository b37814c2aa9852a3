"""The benchmark of feeding DALI on a small data set; times are not asserted."""

import json
from pathlib import Path

import pytest

from tests.trainer.small import small_config, write_images
from trainer.bench import feed


def test_cost_of_feeding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path / "run", write_images(tmp_path / "images"), data={"workers": 1})
    result = feed.run(config, tmp_path, [4], batches=2, repeats=1)
    assert [(row["batch_size"], row["mode"]) for row in result["rows"]] == [(4, "inline"), (4, "thread")]
    inline, thread = result["rows"]
    assert inline["feeding_ms"] == 0, "this thread feeds"
    assert thread["feeding_ms"] > 0
    assert inline["launching_ms"] > 0
    feed.report(result, tmp_path / "feed.json")
    assert json.loads((tmp_path / "feed.json").read_text()) == result
    assert "launching thread" in capsys.readouterr().out
