"""One self-contained HTML page about a run: summary, charts, galleries, configuration.

The page loads nothing from anywhere: plotly.js, styles and images (base64 PNG) are inside it, and its
Content-Security-Policy forbids the rest. The template is `run.html.j2`; what is charted is in `CHARTS`.
"""

import base64
import json
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from trainer.run.results import Row, evaluation_rows, read_evaluations

Image = NDArray[np.uint8]

MAX_POINTS = 1000  # per line: more cannot be told apart on a screen and only makes the page heavy
MAX_IMAGE_SIDE = 160  # pixels: larger pictures are shrunk, they are shown as thumbnails
CRISP_SIDE = 96  # pixels: pictures up to this side are scaled up without smoothing


@dataclass(frozen=True)
class Gallery:
    """A row of uint8 RGB pictures, each [H, W, 3], each with its caption; `query` stands apart in front."""

    title: str
    query: Image | None
    images: list[Image]
    captions: list[str]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(
                f"gallery {self.title!r} has {len(self.images)} images and {len(self.captions)} captions: "
                "one caption per image is needed"
            )


@dataclass(frozen=True)
class Line:
    """One metric in a chart: its key in the rows, its name for readers, which y axis (1 left, 2 right)."""

    key: str
    label: str
    axis: int = 1


@dataclass(frozen=True)
class Chart:
    """A chart of one or two lines. `percent` and `from_zero` name the axes (1, 2) they apply to."""

    section: str
    title: str
    note: str
    lines: tuple[Line, ...]
    percent: tuple[int, ...] = ()
    from_zero: tuple[int, ...] = ()


LEARNING, NEGATIVES, SCHEDULES, SPEED, OTHER = "Learning", "Negatives", "Schedules", "Speed", "Other metrics"

CHARTS = (
    Chart(LEARNING, "Loss", "What the encoder descends on.", (Line("loss", "loss"),)),
    Chart(
        LEARNING,
        "kNN accuracy",
        "Weighted nearest neighbours on the frozen features, after each evaluated epoch.",
        (Line("knn", "kNN"),),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Linear accuracy",
        "Of the checkpoints that were evaluated by a linear classifier on the frozen features.",
        (Line("linear", "full protocol"), Line("linear-fast", "fast")),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Pretext accuracy",
        "Share of queries closer to their own key than to every negative. "
        "Near 100\N{NO-BREAK SPACE}% the negatives do no work.",
        (Line("pretext_top1", "top-1"),),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Similarities",
        "Cosine of a query with its own key and with its hardest negative, on average.",
        (Line("positive_similarity", "own key"), Line("hardest_similarity", "hardest negative")),
    ),
    Chart(
        LEARNING,
        "Spread of the embeddings",
        "Standard deviation of an element, 1 where they are all over the sphere, 0 where all are one; "
        "and over how many directions they spread.",
        (Line("feature_std", "standard deviation"), Line("effective_rank", "effective rank", axis=2)),
        from_zero=(1, 2),
    ),
    Chart(
        NEGATIVES,
        "Adversary",
        "Norms of the ascent gradient and of the negatives' weights.",
        (Line("adversary_grad_norm", "gradient"), Line("bank_norm", "weights", axis=2)),
    ),
    Chart(
        NEGATIVES,
        "Negatives at work",
        "Share of the negatives that carry weight in the loss.",
        (Line("bank_share", "share"),),
        percent=(1,),
        from_zero=(1,),
    ),
    Chart(
        SCHEDULES,
        "Learning rates",
        "Encoder on the left axis, negatives on the right.",
        (Line("lr", "encoder"), Line("bank_lr", "negatives", axis=2)),
        from_zero=(1, 2),
    ),
    Chart(
        SCHEDULES,
        "Teacher momentum",
        "Share of the teacher kept at each step.",
        (Line("teacher_momentum", "momentum"),),
    ),
    Chart(
        SPEED,
        "Throughput",
        "Images per second, and the share of the time spent waiting for data.",
        (Line("images_per_second", "images/s"), Line("data_wait", "data wait", axis=2)),
        percent=(2,),
        from_zero=(1, 2),
    ),
    Chart(
        SPEED,
        "Model FLOPs",
        "What the step asks for, in TFLOP/s of each rank, and as a share of what the GPU is sold for.",
        (Line("teraflops", "TFLOP/s"), Line("mfu", "MFU", axis=2)),
        percent=(2,),
        from_zero=(1, 2),
    ),
    Chart(
        SPEED,
        "Memory",
        "Peak memory, GiB: of tensors, and on a GPU what torch has reserved for them.",
        (Line("memory_gib", "GiB"), Line("reserved_gib", "reserved")),
        from_zero=(1,),
    ),
)

POSITION_KEYS = {"step", "epoch", "images", "seconds"}  # where a row was written: never charted themselves


def render(
    run_dir: Path,
    config: dict[str, Any],
    rows: list[Row],
    results: dict[str, Any],
    neighbours: list[Gallery],
    negatives: list[Gallery],
) -> str:
    """The page, as HTML.

    `config` is the resolved configuration, `rows` those of metrics.jsonl, `results` the content of
    results.json ({} while the run is not finished); evaluations that `run_dir` has are shown, too. `neighbours` are
    images with their nearest neighbours, `negatives` are negatives with the images nearest to them; either may be
    empty.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = png_data_url
    environment.filters["crisp"] = lambda image: max(image.shape[:2]) <= CRISP_SIDE
    evaluated = read_evaluations(run_dir)
    charts = draw_charts([*rows, *evaluation_rows(rows, evaluated)], results)
    return environment.get_template("run.html.j2").render(
        name=run_dir.resolve().name,
        run_dir=str(run_dir),
        finished=bool(results),
        accuracy=summarise_accuracy(rows, results),
        facts=summarise_run(rows, results),
        sections={
            name: [chart for chart in charts if chart["section"] == name]
            for name in (LEARNING, NEGATIVES, SCHEDULES, SPEED, OTHER)
        },
        charts=charts,
        phases=summarise_phases(rows),
        evaluations=summarise_evaluations(evaluated),
        gaps=count_non_finite(rows),
        neighbours=neighbours,
        negatives=negatives,
        results={key: format_value(value) for key, value in results.items()},
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        plotly=Markup(get_plotlyjs()),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(sys.orig_argv),
    )


def draw_charts(rows: list[Row], results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page's script draws: the known charts that have data, then one for every other number."""
    position = "epoch" if all(is_number(row.get("epoch")) for row in rows) else "step"
    known = {line.key for chart in CHARTS for line in chart.lines} | POSITION_KEYS
    others = sorted({key for row in rows for key, value in row.items() if is_number(value)} - known)
    charts = [*CHARTS, *(Chart(OTHER, key.replace("_", " "), "", (Line(key, key),)) for key in others)]
    drawn = (draw_chart(chart, rows, position) for chart in charts)
    present = [chart for chart in drawn if chart["lines"]]
    for number, chart in enumerate(present):
        chart["id"] = f"chart-{number}"
        if chart["title"] == "kNN accuracy":
            chart["levels"] = [level for level in reference_levels(results) if level["label"] == "untrained"]
    return present


def draw_chart(chart: Chart, rows: list[Row], position: str) -> dict[str, Any]:
    lines = []
    for line in chart.lines:
        points = [
            (float(row[position]), float(row[line.key]))
            for row in rows
            if is_number(row.get(position)) and is_number(row.get(line.key))
        ]
        if any(math.isfinite(y) for _, y in points):
            x, y = thin(points)
            lines.append({"label": line.label, "axis": line.axis, "x": x, "y": y})
    return {
        "section": chart.section,
        "title": chart.title,
        "note": chart.note,
        "position": position,
        "lines": lines,
        "levels": [],
        "percent": list(chart.percent),
        "from_zero": list(chart.from_zero),
    }


def thin(points: list[tuple[float, float]]) -> tuple[list[float | None], list[float | None]]:
    """At most MAX_POINTS points, each the mean of neighbours; None (a gap) where a value is not finite."""
    count = min(len(points), MAX_POINTS)
    means = [part.mean(axis=0) for part in np.array_split(np.array(points), count)]
    return [finite(x) for x, _ in means], [finite(y) for _, y in means]


def finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def count_non_finite(rows: Iterable[Row]) -> int:
    return sum(is_number(value) and not math.isfinite(value) for row in rows for value in row.values())


def reference_levels(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What a kNN accuracy is to be held against, as far as the results tell: untrained encoder, chance."""
    levels = []
    if is_number(results.get("knn_untrained")):
        levels.append({"label": "untrained", "name": "the untrained encoder", "value": results["knn_untrained"]})
    if is_number(results.get("classes")) and results["classes"] > 0:
        levels.append({"label": "chance", "name": "chance", "value": 1 / results["classes"]})
    return levels


def summarise_accuracy(rows: list[Row], results: dict[str, Any]) -> dict[str, Any] | None:
    """The kNN accuracy and its gains: the final one, or the latest so far; None if there is none."""
    evaluated = [row for row in rows if is_number(row.get("knn"))]
    if is_number(results.get("knn")):
        value, when = results["knn"], ""
    elif evaluated:
        value, when = evaluated[-1]["knn"], f"so far, at step {evaluated[-1]['step']:,}"
    else:
        return None
    settings = [f"{key} = {results[key]}" for key in ("k", "temperature") if key in results]
    levels = reference_levels(results)
    return {
        "value": value,
        "text": format_percent(value),
        "detail": ", ".join([*settings, when] if when else settings),
        "levels": levels,
        "gains": [
            f"{100 * (value - level['value']):+.1f} points over {level['name']} ({format_percent(level['value'])})"
            for level in levels
        ],
    }


def summarise_run(rows: list[Row], results: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the facts on top of the page: from the results, else from the last rows."""
    facts = {key: latest(key, rows) for key in ("epoch", "images", "seconds", "images_per_second", "data_wait")}
    facts.update({key: value for key, value in results.items() if value is not None})
    formats = {
        "epoch": ("epochs", lambda value: f"{value:,.4g}"),
        "images": ("images seen", lambda value: f"{value:,.0f}"),
        "seconds": ("training time", format_seconds),
        "images_per_second": ("images per second", lambda value: f"{value:,.0f}"),
        "data_wait": ("waiting for data", format_percent),
    }
    numbers = [
        (label, write(facts[key]))
        for key, (label, write) in formats.items()
        if is_number(facts[key]) and math.isfinite(facts[key])
    ]
    machine = [str(facts["device"])] if "device" in facts else []
    machine += [f"torch {facts['torch']}"] if "torch" in facts else []
    return numbers + ([("machine", ", ".join(machine))] if machine else [])


def summarise_phases(rows: list[Row]) -> list[dict[str, str]]:
    """Where the time of a step goes, over the whole run; the slowest rank of the last row where there are several."""
    timed = [row["phases"] for row in rows if "phases" in row]
    if not timed:
        return []
    means = {name: sum(row.get(name, {"seconds": 0.0})["seconds"] for row in timed) / len(timed) for name in timed[-1]}
    return [
        {
            "name": name,
            "time": f"{1e3 * seconds:.1f} ms",
            "share": format_percent(seconds / sum(means.values())),
            "slowest": f"rank {last['rank']}, {1e3 * last['slowest']:.1f} ms"
            if last["slowest"] > last["seconds"]
            else "",
        }
        for (name, seconds), last in zip(means.items(), timed[-1].values(), strict=True)
    ]


def summarise_evaluations(found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """A row for each evaluation: its name, its result, and what that is of."""
    formats = {
        "protocol": "{}",
        "step": "checkpoint of step {:,}",
        "labels": "{:,} labels",
        "epochs": "{} epochs",
        "lr": "learning rate {:g}",
        "top5": "top-5 {:.1%}",
        "map_11_point": "11-point mAP {:.1%}",
        "unreadable": "{} images unreadable",
    }
    return [
        {
            "name": name,
            "result": format_evaluation(results),
            "detail": ", ".join(
                write.format(results[key]).replace("%", " %") for key, write in formats.items() if results.get(key)
            ),
        }
        for name, results in found.items()
    ]


def format_evaluation(results: dict[str, Any]) -> str:
    """The figure of an evaluation's results, with the deviation where there are several."""
    if "map" in results:
        return f"mAP {format_percent(results['map'])}"
    deviation = results.get("top1_deviation")
    return format_percent(results["top1"]) + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def latest(key: str, rows: list[Row]) -> Any:
    return next((row[key] for row in reversed(rows) if key in row), None)


def format_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def format_seconds(seconds: float) -> str:
    """3 s, 2 min 5 s, 3 h 20 min, 2 d 4 h: the two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {whole % 60} s"
    return f"{whole} s"


def format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)


def png_data_url(image: Image) -> str:
    """A uint8 RGB picture [H, W, 3] as a data URL, shrunk to a thumbnail if it is larger than one."""
    import cv2

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture of {image.dtype} {list(image.shape)} was given, uint8 [H, W, 3] is needed")
    scale = MAX_IMAGE_SIDE / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    written, data = cv2.imencode(".png", image[:, :, ::-1])
    assert written, "OpenCV refused to write a PNG"
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode()
