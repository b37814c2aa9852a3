"""The comparison of runs: the table, the page, and errors."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.trainer.small import small_config
from trainer.config_file import dump
from trainer.report.compare import IGNORED_SETTINGS, charts, compare, differences, read, tabulate

HOSTILE = "<img src=x onerror=alert(1)>"


def write_run(folder: Path, accuracies: list[float], linear: float | None = None, **sections: dict[str, Any]) -> Path:
    """Writes a run with 6 steps per epoch and one kNN accuracy per epoch, the first before training; 4 finish it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(small_config(folder, Path("pictures"), **sections)), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for number, accuracy in enumerate(accuracies):
        position = {"step": 6 * number, "epoch": number, "images": 72 * number, "seconds": 1800.0 * number}
        rows += [{**position, "loss": 1.0, "feature_std": 0.5, "effective_rank": 7.25}] if number else []
        rows += [{**position, "knn": accuracy}]
    if linear:
        (folder / "linear").mkdir()
        (folder / "linear" / "settings.json").write_text("{}")
        (folder / "linear" / "results.json").write_text(json.dumps({"top1": linear, "protocol": "linear"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if len(accuracies) == 4:
        (folder / "results.json").write_text(json.dumps({"knn": accuracies[-1]}), encoding="utf-8")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / HOSTILE, [0.1, 0.5, 0.7, 0.6]),
        write_run(tmp_path / "b/run", [0.1, 0.4], method={"name": "moco"}, bank={"size": 40}),
        write_run(tmp_path / "c/run", [0.2, 0.3, 0.4, 0.5], 0.65, method={"name": "simclr", "bn": "local"}),
    ]


def test_accuracies_on_named_validation_images(tmp_path: Path, folders: list[Path]) -> None:
    with_more = write_run(tmp_path / "more", [0.1, 0.5, 0.7, 0.6])
    log = with_more / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row | ({"knn_sketch": row["knn"] / 2, "knn_pixels": 0.4} if "knn" in row else {}) for row in rows]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [read(folder, folders) for folder in (folders[0], with_more)]
    columns, table = tabulate(runs)
    assert [row[columns.index("kNN sketch")] for row in table] == ["", "30.0 %"]
    assert "kNN pixels" not in columns
    assert [chart["title"] for chart in charts(runs)][3] == "kNN sketch against epochs"


def test_the_table(folders: list[Path]) -> None:
    columns, rows = tabulate([read(folder, folders) for folder in folders])
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["run"] for row in table] == [HOSTILE, str(folders[1]), str(folders[2])]
    assert [row["method"] for row in table] == ["adco", "moco", "simclr"]
    assert [row["kNN before"] for row in table] == ["10.0 %", "10.0 %", "20.0 %"]
    assert [row["kNN best"] for row in table] == ["70.0 % (epoch 2)", "40.0 % (epoch 1)", "50.0 % (epoch 3)"]
    assert [row["kNN last"] for row in table] == ["60.0 %", "40.0 %", "50.0 %"]
    assert [row["linear"] for row in table] == ["", "", "65.0 %"]
    assert [row["images"] for row in table] == ["216", "72", "216"]
    assert [row["time"] for row in table] == ["1 h 30 min", "30 min 0 s", "1 h 30 min"]
    assert table[0]["effective rank"] == "7.2"


def test_the_settings_that_differ(folders: list[Path]) -> None:
    found = differences([read(folder, folders) for folder in folders])
    assert found["method.name"] == ["adco", "moco", "simclr"]
    assert found["bank.size"] == ["30", "40", "30"]
    assert found["method.symmetric"] == ["False", "False", ""]
    assert not found.keys() & {*IGNORED_SETTINGS, "model.backbone"}


def test_a_chart_for_each_x_axis(folders: list[Path]) -> None:
    drawn = {chart["id"]: chart for chart in charts([read(folder, folders) for folder in folders])}
    assert list(drawn) == [f"{metric}-{x}" for metric in ("knn",) for x in ("epoch", "images", "hours")]
    assert drawn["knn-images"]["lines"][1]["x"] == [0, 72]
    assert drawn["knn-hours"]["lines"][0]["x"] == [0, 0.5, 1, 1.5]
    assert drawn["knn-hours"]["lines"][0]["y"] == [0.1, 0.5, 0.7, 0.6]


def test_the_page(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(folders, tmp_path / "new/page.html")
    assert "simclr" in capsys.readouterr().out
    html = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "Not finished: " + str(folders[1]) in html
    own = re.sub(r"<script>.{1000000,}?</script>", "", html, count=1, flags=re.DOTALL)
    assert len(own) < len(html) - 1_000_000
    assert not re.search(r'(src|href)="(?!data:)', own)
    if shutil.which("chromium"):
        with chromium(tmp_path) as browser:
            browser.open(tmp_path / "new/page.html")
            browser.wait("document.querySelectorAll('.plot.js-plotly-plot').length === 3")
            browser.wait("document.querySelectorAll('g.trace.scatter').length === 3 * 3")
            assert browser.problems == []


def test_errors(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a run"):
        compare([folders[0], tmp_path / "nowhere"], tmp_path / "page.html")
    bare = write_run(tmp_path / "bare", [])
    with pytest.raises(ValueError, match="no run has been evaluated yet"):
        compare([bare], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
