"""The benchmark of the data backends on a small run; times are not asserted."""

import json
from pathlib import Path

import pytest

from tests.trainer.small import small_config, write_images
from trainer.bench import data


def test_backends_operations_and_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path / "run", write_images(tmp_path / "images", each=8))
    result = data.run(config, tmp_path, turn_seconds=0.01, repeats=1, workers=1)
    assert result["workers"] == {"pil": 2, "cpu": 1, "dali": 1}
    assert result["backend"] == "cpu"
    assert result["network_images_per_second"] > 0
    for name in ("pil", "cpu", "dali"):
        assert result["images_per_second"][name] > 0
        assert result["times_pil"][name] == result["images_per_second"][name] / result["images_per_second"]["pil"]
        assert list(result["milliseconds"][name]) == [
            "read", "decode", "crop, resize", "flip", "colour", "blur", "solarize", "normalise"
        ]  # fmt: skip
        assert sum(result["milliseconds"][name].values()) > 0
    data.report(result, tmp_path / "out/data.json")
    assert json.loads((tmp_path / "out/data.json").read_text()) == result
    printed = capsys.readouterr().out
    assert "times pil" in printed
    assert "resnet18 trains" in printed
