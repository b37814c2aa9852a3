"""The report: the page has all content, loads nothing from the network, and a browser draws it."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import chromium
from trainer.report.charts import MAX_POINTS
from trainer.report.format import format_seconds
from trainer.report.galleries import Gallery
from trainer.report.page import Image, image_data_url
from trainer.report.run import render
from trainer.run.results import read_rows

HOSTILE = "<script>alert('x')</script>\"&<img src=http://evil.example/x.png>"


def training_rows(num_steps: int = 400) -> list[dict[str, Any]]:
    """Returns noisy rows as the training loop writes them. One loss is not finite."""
    noise = np.random.default_rng(0)
    rows = []
    for step in range(10, num_steps + 1, 10):
        done = step / num_steps
        rows.append(
            {
                "step": step,
                "epoch": 5 * done,
                "images": step * 512,
                "seconds": step * 0.4,
                "loss": 8.5 - 2 * (1 - math.exp(-4 * done)) + 0.05 * noise.normal(),
                "pretext_top1": 0.85 * (1 - math.exp(-5 * done)) + 0.01 * noise.normal(),
                "positive_similarity": 0.6 + 0.3 * done,
                "hardest_similarity": 0.9 - 0.2 * done,
                "adversary_grad_norm": 0.02 * math.exp(-2 * done) + 0.001 * noise.random(),
                "bank_norm": 1 + 0.5 * done,
                "bank_share": 0.4 + 0.3 * done,
                "teacher_momentum": 0.99 + 0.01 * done,
                "lr": 0.06 * 0.5 * (1 + math.cos(math.pi * done)),
                "bank_lr": 3.0,
                "images_per_second": 1250 + 20 * noise.normal(),
                "data_wait": 0.02 + 0.01 * noise.random(),
                "memory_gib": 1.4,
                "teraflops": 0.05,
                "phases": {
                    "data": {"seconds": 0.001, "slowest": 0.02, "rank": 3},
                    "backward": {"seconds": 0.299 if step > 10 else 0.339, "slowest": 0.299, "rank": 0},
                },
            }
        )
    rows[7]["loss"] = math.nan
    return rows


def evaluation_rows(num_steps: int = 400) -> list[dict[str, Any]]:
    accuracies = [0.76, 0.79, 0.81, 0.822, 0.829]
    return [
        {"step": num_steps * epoch // 5, "epoch": float(epoch), "images": 1, "seconds": 1.0, "knn": accuracy}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


RESULTS = {
    "knn_untrained": 0.7112,
    "knn_pixels": 0.8342,
    "knn": 0.8291,
    "k": 200,
    "temperature": 0.07,
    "classes": 10,
    "images": 204800,
    "seconds": 163.4,
    "images_per_second": 1253.4,
    "data_wait": 0.024,
    "device": "cpu",
    "torch": "2.14.1",
}

CONFIG = {"run": {"dir": "runs/demo"}, "data": {"train": HOSTILE}, "bank": {"size": 4096}}


def disc_images(count: int, side: int = 28) -> list[Image]:
    """Returns discs and rings of different sizes, which a person can distinguish."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    radius = np.hypot(x, y)
    shapes = [np.abs(radius - 0.45 * (i + 1) / count) < 0.08 for i in range(count)]
    return [np.repeat((255 * shape).astype(np.uint8)[:, :, None], 3, axis=2) for shape in shapes]


def galleries(count: int, title: str, with_query: bool, side: int = 28) -> list[Gallery]:
    images = disc_images(9, side)
    names = ["Sneaker", "Ankle boot", "T-shirt/top", HOSTILE, "Coat", "Dress", "Bag", "Sandal"]
    captions = [f"{name} 0.{99 - i}" for i, name in enumerate(names)]
    return [Gallery(f"{title} {i}", images[0] if with_query else None, images[1:], captions) for i in range(count)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "demo"
    run_dir.mkdir()
    rows = [*training_rows(), *evaluation_rows()]
    rows[0]["mined_pairs"] = 12  # a metric that no chart shows
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        # The page names the command that made it, which in a process of pytest-xdist contains `import`.
        patch.setattr(sys, "orig_argv", ["python", "-m", "trainer", "report"])
        html = render(
            run_dir,
            CONFIG,
            read_rows(run_dir / "metrics.jsonl"),
            RESULTS,
            galleries(4, "Test image", with_query=True),
            [*galleries(3, "Negative", with_query=False), *galleries(1, "Photograph", False, side=224)],
        )
    path = run_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def own_text(html: str) -> str:
    """Returns the page without plotly.js."""
    without = re.sub(r"<script>.{1000000,}?</script>", "", html, count=1, flags=re.DOTALL)
    assert len(without) < len(html) - 1_000_000
    return without


def drawn_charts(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.DOTALL)
    assert found
    charts: list[dict[str, Any]] = json.loads(found.group(1), parse_constant=pytest.fail)
    return charts


def test_the_summary_of_the_page(page: Path) -> None:
    text = own_text(page.read_text(encoding="utf-8"))
    assert "<title>demo: kNN 82.9 %</title>" in text
    for expected in (
        "82.9 %",
        "+11.8 points over the untrained encoder (71.1 %)",
        "-0.5 points over the raw pixels (83.4 %)",
        "+72.9 points over chance (10.0 %)",
        "k = 200, temperature = 0.07",
        "204,800",
        "2 min 43 s",
        "1,253",
        "2.4 %",
        "2.14.1",
        "1 logged value is not finite",
        "size: 4096",
        "Test image 0",
        "Ankle boot 0.98",
    ):
        assert expected in text, expected


def test_evaluations(tmp_path: Path) -> None:
    found = {
        "linear": {"top1": 0.7, "top5": 0.9, "protocol": "linear", "step": 7020, "lr": 10.0, "unreadable": 0},
        "finetune-1pct": {"top1": 0.5, "top1_deviation": 0.0123, "labels": 600, "protocol": "fine-tuning"},
        "voc07": {"map": 0.812, "map_11_point": 0.79, "protocol": "VOC07 SVM"},
        "not-finished": {},
    }
    for name, results in found.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text("{}")
        if results:
            (tmp_path / name / "results.json").write_text(json.dumps(results))
    html = own_text(render(tmp_path, {}, evaluation_rows(), {}, [], []))
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td><code>.*?)</tr>", html)]
    assert rows == [
        ["<code>finetune-1pct</code>", "50.0 % ± 1.2", "fine-tuning, 600 labels"],
        ["<code>linear</code>", "70.0 %", "linear, checkpoint of step 7,020, learning rate 10, top-5 90.0 %"],
        ["<code>voc07</code>", "mAP 81.2 %", "VOC07 SVM, 11-point mAP 79.0 %"],
    ]


def test_the_time_of_each_phase(page: Path) -> None:
    html = own_text(page.read_text(encoding="utf-8"))
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", html)]
    assert ["data", "1.0 ms", "0.3 %", "rank 3, 20.0 ms"] in rows
    assert ["backward", "300.0 ms", "99.7 %", ""] in rows, "the mean of all rows; no rank is slower"


def test_every_metric_is_charted_unknown_ones_last(page: Path) -> None:
    charts = drawn_charts(page.read_text(encoding="utf-8"))
    assert [chart["title"] for chart in charts] == [
        "Loss",
        "kNN accuracy",
        "Pretext accuracy",
        "Similarities",
        "Adversary",
        "Negatives in use",
        "Learning rates",
        "Teacher momentum",
        "Throughput",
        "Model FLOPs",
        "Memory",
        "mined pairs",
    ]
    loss, knn = charts[0], charts[1]
    assert loss["lines"][0]["y"].count(None) == 1, "a loss that is not finite must leave a gap"
    assert knn["lines"][0]["y"] == [0.76, 0.79, 0.81, 0.822, 0.829]
    assert [(level["label"], level["value"]) for level in knn["levels"]] == [
        ("untrained", 0.7112),
        ("raw pixels", 0.8342),
    ]


def test_hostile_text_is_escaped_and_nothing_is_loaded(page: Path) -> None:
    text = own_text(page.read_text(encoding="utf-8"))
    assert "<script>alert" not in text
    assert "<img src=http" not in text
    assert "&lt;script&gt;alert" in text
    loads = re.findall(r"""(?:\ssrc|\shref|\saction|\ssrcset)\s*=\s*["']?([^\s"'>]+)""", text)
    # An address in a text, whose < is escaped, is not an attribute.
    attributes = [load for load in loads if not load.startswith("http://evil.example")]
    assert attributes
    assert all(load.startswith("data:") for load in attributes)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|\bimport\s", text)
    assert "default-src 'none'" in text


def test_a_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    html = render(tmp_path, {}, [{"step": 1}, {"step": 2, "loss": math.inf}], {}, [], [])
    assert drawn_charts(html) == []
    assert "no results yet" in html
    assert "Nearest neighbours</h2>" not in html


def test_an_unfinished_run_shows_its_latest_accuracy(tmp_path: Path) -> None:
    first = {"step": 0, "epoch": 0.0, "knn": 0.7, "knn_pixels": 0.8342}
    html = render(tmp_path, {}, [first, *evaluation_rows()], {}, [], [])
    assert "82.9 %" in html
    assert "so far, at step 400" in html
    (knn,) = drawn_charts(html)
    assert [(level["label"], level["value"]) for level in knn["levels"]] == [("raw pixels", 0.8342)]
    (knn,) = drawn_charts(render(tmp_path, {}, [first | {"knn_sketch": 0.5}], {}, [], []))
    assert [(line["label"], line["y"]) for line in knn["lines"]] == [("kNN", [0.7]), ("sketch", [0.5])]


def test_rows_without_epochs_are_drawn_over_steps(tmp_path: Path) -> None:
    chart = drawn_charts(render(tmp_path, {}, [{"step": 7, "loss": 1.0}], {}, [], []))[0]
    assert (chart["position"], chart["lines"][0]["x"]) == ("step", [7.0])


def test_long_runs_are_averaged(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step % 2)} for step in range(10 * MAX_POINTS)]
    line = drawn_charts(render(tmp_path, {}, rows, {}, [], []))[0]["lines"][0]
    assert len(line["x"]) == MAX_POINTS
    assert set(line["y"]) == {0.5}


def test_a_truncated_row_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 3.0}]
    assert read_rows(tmp_path / "none") == []


def test_galleries_and_images_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images and 0 captions"):
        Gallery("g", None, disc_images(1), [])
    with pytest.raises(ValueError, match=r"got an image of uint8 \[28, 28\], need uint8 \[H, W, 3\]"):
        image_data_url(np.zeros((28, 28), np.uint8))


def test_images_keep_their_colours_and_large_ones_are_shrunk() -> None:
    import base64

    import cv2

    red = np.zeros((400, 200, 3), np.uint8)
    red[:, :, 0] = 200
    data = base64.b64decode(image_data_url(red).split(",")[1])
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    assert bgr.shape == (160, 80, 3)
    assert bgr[0, 0].tolist() == [0, 0, 200]


def test_a_strip_has_a_thumbnail() -> None:
    assert image_data_url(np.zeros((2, 5000, 3), np.uint8)).startswith("data:image/png")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (163, "2 min 43 s"), (3599.6, "1 h 0 min"), (190000, "2 d 4 h")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on PATH")
@pytest.mark.parametrize("width", [1280, pytest.param(400, marks=pytest.mark.slow)])
def test_a_browser_draws_every_chart(page: Path, tmp_path: Path, width: int) -> None:
    charts = drawn_charts(page.read_text(encoding="utf-8"))
    with chromium(tmp_path, width) as browser:
        browser.open(page)
        browser.wait(f"document.querySelectorAll('.js-plotly-plot').length === {len(charts)}")
        plots = browser.run("[...document.querySelectorAll('.plot.js-plotly-plot')].map(plot => plot.id)")
        assert plots == [chart["id"] for chart in charts]
        traces = sum(len(chart["lines"]) + len(chart["levels"]) for chart in charts)
        browser.wait(f"document.querySelectorAll('g.trace.scatter').length === {traces}")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "the page has no horizontal scrolling"
        assert browser.problems == []
