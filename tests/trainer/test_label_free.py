"""The script that correlates numbers of the log with the linear accuracy."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "docs/bench/label_free.py"


def write_run(folder: Path, rankme: float, uniformity: float, linear: float | None) -> Path:
    folder.mkdir()
    rows = [
        {"step": 1, "rankme": 100.0},
        {"step": 2, "rankme": rankme, "uniformity": uniformity},
        {"step": 2, "loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, top1 in ((1, 0.9), (2, linear)) if linear is not None else ():
        evaluation = folder / f"linear-fast-step{step}"
        evaluation.mkdir()
        (evaluation / "settings.json").write_text("{}")
        (evaluation / "results.json").write_text(json.dumps({"top1": top1, "step": step}))
    return folder


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("label_free", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_record_of_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Final runs are left out, and a number counts the runs that have it."""
    rows = [(1.0, 0.1, 0.4), (2.0, 0.2, 0.3), (None, 0.3, 0.2), (3.0, 0.4, 0.1), (0.0, 0.9, 0.9)]
    lines = [
        {
            "final": i == 4,
            "linear-fast": {"top1": linear},
            "last": {"knn": knn} | ({"rankme": rankme} if rankme else {}),
        }
        for i, (rankme, linear, knn) in enumerate(rows)
    ]
    record = tmp_path / "record.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    load_script().main([str(record)])
    printed = capsys.readouterr().out
    assert "| `rankme` | 1.00 | -1.00 | 3 |" in printed
    assert "| `knn` | -1.00 | 1.00 | 4 |" in printed


def test_numbers_are_ranked_like_the_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_free = load_script()
    values = [(3.0, -1.0, 0.5), (9.0, -2.0, 0.6), (10.0, -4.0, 0.7), (11.0, -3.0, 0.8), (0.0, 9.0, None)]
    runs = [write_run(tmp_path / f"run{i}", *each) for i, each in enumerate(values)]
    found = label_free.correlations(runs)
    assert found["rankme"] == (pytest.approx(1.0), 4)
    assert found["uniformity"] == (pytest.approx(-0.8), 4), "1 - 6 * 18 / 60"
    label_free.main([str(run) for run in runs])
    printed = capsys.readouterr()
    assert "| `rankme` | 1.00 | 4 |" in printed.out
    assert str(runs[4]) in printed.err
