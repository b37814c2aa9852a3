"""The charts of the reports: which metrics are drawn together, and the data that the script of the pages draws."""

import math
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np

from trainer.report.format import is_number
from trainer.run.results import POSITION_KEYS, Row, more_knn

LEVEL_KEYS = {"knn_pixels"}  # metrics that are drawn as horizontal lines
MAX_POINTS = 1000  # per line: a screen cannot show more, and they would make the page larger

Drawing = dict[str, Any]  # a chart as `templates/charts.html.j2` draws it
Level = dict[str, Any]  # a horizontal line: its label in the legend, its name in sentences, its value


@dataclass(frozen=True)
class Line:
    """A metric in a chart: its key in metrics.jsonl, its name in the legend, its y axis (1 left, 2 right)."""

    key: str
    label: str
    axis: int = 1


@dataclass(frozen=True)
class Chart:
    """A chart of one or two metrics. `percent` and `from_zero` list the y axes (1, 2) that they apply to."""

    section: str
    title: str
    note: str
    lines: tuple[Line, ...] = ()
    percent: tuple[int, ...] = ()
    from_zero: tuple[int, ...] = ()


LEARNING, NEGATIVES, SCHEDULES, SPEED, OTHER = "Learning", "Negatives", "Schedules", "Speed", "Other metrics"
SECTIONS = (LEARNING, NEGATIVES, SCHEDULES, SPEED, OTHER)

CHARTS = (
    Chart(LEARNING, "Loss", "The training loss, which the encoder minimises.", (Line("loss", "loss"),)),
    Chart(
        LEARNING,
        "kNN accuracy",
        "Accuracy of weighted nearest neighbours on the frozen features.",
        (Line("knn", "kNN"),),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Linear probe",
        "Accuracy of a linear classifier that is trained beside the encoder: on training views, before "
        "it learns from them, and on the validation images.",
        (Line("probe_top1", "training views"), Line("probe_val_top1", "validation images")),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Linear accuracy",
        "Accuracy of a linear classifier on the frozen features, for each evaluated checkpoint.",
        (Line("linear", "full protocol"), Line("linear-fast", "fast")),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Pretext accuracy",
        "Share of queries that are closer to their own key than to every negative. "
        "Near 100\N{NO-BREAK SPACE}% the negatives are too easy.",
        (Line("pretext_top1", "top-1"),),
        percent=(1,),
    ),
    Chart(
        LEARNING,
        "Similarities",
        "Mean cosine similarity of a query with its own key and with its hardest negative.",
        (Line("positive_similarity", "own key"), Line("hardest_similarity", "hardest negative")),
    ),
    Chart(
        LEARNING,
        "Spread of the embeddings",
        "Standard deviation of an embedding's elements (1: spread over the sphere, 0: collapsed), "
        "and the number of directions that the embeddings use.",
        (Line("feature_std", "standard deviation"), Line("effective_rank", "effective rank", axis=2)),
        from_zero=(1, 2),
    ),
    Chart(
        NEGATIVES,
        "Adversary",
        "Norms of the negatives' gradient and of their weights.",
        (Line("adversary_grad_norm", "gradient"), Line("bank_norm", "weights", axis=2)),
    ),
    Chart(
        NEGATIVES,
        "Negatives in use",
        "Share of the negatives that have weight in the loss.",
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
        "Weight of the old teacher in its moving average.",
        (Line("teacher_momentum", "momentum"),),
    ),
    Chart(
        SPEED,
        "Throughput",
        "Images per second, and the share of time spent waiting for data.",
        (Line("images_per_second", "images/s"), Line("data_wait", "data wait", axis=2)),
        percent=(2,),
        from_zero=(1, 2),
    ),
    Chart(
        SPEED,
        "Model FLOPs",
        "TFLOP/s per rank, and their share of the GPU's peak (MFU).",
        (Line("teraflops", "TFLOP/s"), Line("mfu", "MFU", axis=2)),
        percent=(2,),
        from_zero=(1, 2),
    ),
    Chart(
        SPEED,
        "Memory",
        "Peak memory in GiB: allocated for tensors and, on a GPU, reserved by torch.",
        (Line("memory_gib", "GiB"), Line("reserved_gib", "reserved")),
        from_zero=(1,),
    ),
)


def draw_charts(rows: list[Row], levels: dict[str, list[Level]]) -> list[Drawing]:
    """Draws each chart that has data, and one more for every metric that no chart shows.

    Args:
        rows: The rows of metrics.jsonl and of the evaluations.
        levels: Horizontal reference lines by the key of the metric they belong to.
    """
    position = "epoch" if all(is_number(row.get("epoch")) for row in rows) else "step"
    known = {line.key for chart in CHARTS for line in chart.lines} | POSITION_KEYS | LEVEL_KEYS
    more = dict.fromkeys(name for row in rows for name in more_knn(row))
    known |= {f"knn_{name}" for name in more}
    others = sorted({key for row in rows for key, value in row.items() if is_number(value)} - known)
    drawings: list[Drawing] = []
    lines_more = tuple(Line(f"knn_{name}", name) for name in more)
    with_more = [replace(x, lines=x.lines + lines_more) if x.lines[0].key == "knn" else x for x in CHARTS]
    for chart in [*with_more, *(Chart(OTHER, key.replace("_", " "), "", (Line(key, key),)) for key in others)]:
        lines = [
            {"label": line.label, "axis": line.axis, "color": number, **points}
            for number, line in enumerate(chart.lines, start=1)
            if (points := draw_points(rows, position, line.key))
        ]
        if lines:
            own_levels = [level for line in chart.lines for level in levels.get(line.key, [])]
            drawings.append(draw_chart(chart, f"chart-{len(drawings)}", position, lines, own_levels))
    return drawings


def draw_chart(
    chart: Chart,
    html_id: str,
    position: str,
    lines: list[dict[str, Any]],
    levels: list[Level] | None = None,
    compares_runs: bool = False,
) -> Drawing:
    """Returns a chart as the script of the pages draws it.

    Args:
        chart: Title, note and axes.
        html_id: The id of the chart's element in the page.
        position: Title of the x axis.
        lines: The output of `draw_points` with label, axis and color (1 to 8; larger numbers are dashed lines).
        levels: Horizontal reference lines.
        compares_runs: Each line is a run. The lines then have different x values, and the legend is always shown.
    """
    return {
        **asdict(chart),
        "id": html_id,
        "position": position,
        "lines": lines,
        "levels": levels or [],
        "compares_runs": compares_runs,
    }


def draw_points(rows: list[Row], position: str, key: str) -> dict[str, list[float | None]] | None:
    """Returns a metric's points as lists x and y in the order of x, or None if it has no finite value.

    Neighbouring points are averaged down to MAX_POINTS. A value that is not finite becomes None, a gap in the line.
    """
    points = sorted(
        (
            (float(row[position]), float(row[key]))
            for row in rows
            if is_number(row.get(position)) and is_number(row.get(key))
        ),
        key=itemgetter(0),
    )
    if not any(math.isfinite(y) for _, y in points):
        return None
    means = [part.mean(axis=0) for part in np.array_split(np.array(points), min(len(points), MAX_POINTS))]
    return {"x": [_finite(x) for x, _ in means], "y": [_finite(y) for _, y in means]}


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
