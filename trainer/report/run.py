"""The report of a run: one self-contained HTML page with a summary, charts, galleries and the configuration."""

import logging
import math
from pathlib import Path
from typing import Any

import yaml

from trainer import distributed
from trainer.report.charts import SECTIONS, Level, draw_charts
from trainer.report.format import format_evaluation, format_percent, format_seconds, format_value, is_number, latest
from trainer.report.galleries import Gallery, draw_galleries
from trainer.report.page import render_page
from trainer.run.checkpoint_files import list_checkpoints
from trainer.run.directory import read_config
from trainer.run.files import read_json, write_atomically
from trainer.run.metrics import set_up_logging
from trainer.run.results import Row, evaluation_rows, primary_metric, read_evaluations, read_rows
from trainer.run.sources import open_sources

log = logging.getLogger(__name__)

# The facts at the top of the page: a key of results.json or metrics.jsonl, its label, and how its value is written.
FACTS = {
    "epoch": ("epochs", lambda value: f"{value:,.4g}"),
    "images": ("images seen", lambda value: f"{value:,.0f}"),
    "seconds": ("training time", format_seconds),
    "images_per_second": ("images per second", lambda value: f"{value:,.0f}"),
    "data_wait": ("waiting for data", format_percent),
}

# How the secondary results of an evaluation are written. Others are written as `key = value`.
EVALUATION_DETAILS = {
    "protocol": "{}",
    "step": "checkpoint of step {:,}",
    "labels": "{:,} labels",
    "epochs": "{} epochs",
    "lr": "learning rate {:g}",
    "top5": "top-5 {:.1%}",
    "knn_pixels": "raw pixels {:.1%}",
    "map_11_point": "11-point mAP {:.1%}",
    "unreadable": "{} images unreadable",
}
HIDDEN_DETAILS = {"network", "images", "seconds", "ranks", "device", "torch"}


def write_report(run: Path, overrides: list[str] | None = None) -> Path:
    """Writes RUN/report.html and returns its path. The galleries need a checkpoint and the images, the rest does not.

    Args:
        run: The run directory.
        overrides: Settings for the galleries, `section.key=value`, such as where the images are now.

    Raises:
        ValueError: `run` is not a run directory, all of its checkpoints are damaged, or the newest cannot be read.
    """
    config = read_config(run, overrides)
    neighbours: list[Gallery] = []
    negatives: list[Gallery] = []
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        if list_checkpoints(run / "checkpoints"):
            try:
                train, val, _ = open_sources(config.data.model_copy(update={"more_val": None}), run)
            except ValueError as error:
                log.warning("the page has no galleries: %s", error)
            else:
                neighbours, negatives = draw_galleries(run, config, rank_info, train, val)
    rows, results = read_rows(run / "metrics.jsonl"), read_json(run / "results.json")
    html = render(run, read_config(run).model_dump(mode="json"), rows, results, neighbours, negatives)
    write_atomically(run / "report.html", html)
    return run / "report.html"


def render(
    run_dir: Path,
    config: dict[str, Any],
    rows: list[Row],
    results: dict[str, Any],
    neighbours: list[Gallery],
    negatives: list[Gallery],
) -> str:
    """Returns the page as HTML.

    Args:
        run_dir: The run directory, whose evaluations are shown as well.
        config: The resolved configuration.
        rows: The rows of metrics.jsonl.
        results: The content of results.json, {} for a run that has not finished.
        neighbours: Validation images with the training images nearest to them; may be empty.
        negatives: Negatives with the training images nearest to them; may be empty.
    """
    evaluated = read_evaluations(run_dir)
    levels = reference_levels(rows, results)
    charts = draw_charts(
        sorted([*rows, *evaluation_rows(rows, evaluated)], key=lambda row: row["step"]),
        {"knn": [level for level in levels if level["label"] != "chance"]},
    )
    return render_page(
        "run.html.j2",
        name=run_dir.resolve().name,
        run_dir=str(run_dir),
        finished=bool(results),
        accuracy=summarise_accuracy(rows, results, levels),
        facts=summarise_run(rows, results),
        sections={name: [chart for chart in charts if chart["section"] == name] for name in SECTIONS},
        charts=charts,
        phases=summarise_phases(rows),
        evaluations=summarise_evaluations(evaluated),
        non_finite=sum(is_number(x) and not math.isfinite(x) for row in rows for x in row.values()),
        neighbours=neighbours,
        negatives=negatives,
        results={key: format_value(value) for key, value in results.items()},
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    )


def reference_levels(rows: list[Row], results: dict[str, Any]) -> list[Level]:
    """Returns what the kNN accuracy is compared with, as far as known: the encoder before, raw pixels, chance."""
    levels = []
    if is_number(results.get("knn_untrained")):
        levels.append({"label": "untrained", "name": "the untrained encoder", "value": results["knn_untrained"]})
    if is_number(results.get("knn_initial")):
        levels.append({"label": "before", "name": "the initial weights", "value": results["knn_initial"]})
    pixels = results.get("knn_pixels", latest("knn_pixels", rows))
    if is_number(pixels):
        levels.append({"label": "raw pixels", "name": "the raw pixels", "value": pixels})
    if is_number(results.get("classes")) and results["classes"] > 0:
        levels.append({"label": "chance", "name": "chance", "value": 1 / results["classes"]})
    return levels


def summarise_accuracy(rows: list[Row], results: dict[str, Any], levels: list[Level]) -> dict[str, Any] | None:
    """Returns the final kNN accuracy, or the latest one of an unfinished run, with its gains over `levels`."""
    evaluated = [row for row in rows if is_number(row.get("knn"))]
    details = [f"{key} = {results[key]}" for key in ("k", "temperature") if key in results]
    if is_number(results.get("knn")):
        value = results["knn"]
    elif evaluated:
        value = evaluated[-1]["knn"]
        details.append(f"so far, at step {evaluated[-1]['step']:,}")
    else:
        return None
    return {
        "value": value,
        "text": format_percent(value),
        "detail": ", ".join(details),
        "levels": levels,
        "gains": [
            f"{100 * (value - level['value']):+.1f} points over {level['name']} ({format_percent(level['value'])})"
            for level in levels
        ],
    }


def summarise_run(rows: list[Row], results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns name and value of the facts at the top of the page, from the results or else from the last rows."""
    values = {key: latest(key, rows) for key in FACTS}
    values |= {key: value for key, value in results.items() if value is not None}
    facts = [
        (label, write(values[key]))
        for key, (label, write) in FACTS.items()
        if is_number(values[key]) and math.isfinite(values[key])
    ]
    machine = [str(results["device"])] if "device" in results else []
    machine += [f"torch {results['torch']}"] if "torch" in results else []
    return facts + ([("machine", ", ".join(machine))] if machine else [])


def summarise_phases(rows: list[Row]) -> list[dict[str, str]]:
    """Returns the mean time of each phase of a step over the run, and the slowest rank in the last row."""
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
    """Returns name, primary metric and details of each evaluation, which `found` holds by the directory's name."""
    return [
        {"name": name, "result": format_evaluation(results), "detail": ", ".join(_details(results))}
        for name, results in found.items()
    ]


def _details(results: dict[str, Any]) -> list[str]:
    metric, _ = primary_metric(results)
    hidden = HIDDEN_DETAILS | EVALUATION_DETAILS.keys() | {metric, f"{metric}_deviation"}
    known = [
        write.format(results[key])
        for key, write in EVALUATION_DETAILS.items()
        if results.get(key) and (write == "{}" or is_number(results[key]))
    ]
    others = [
        f"{key} = {format_value(x)}"
        for key, x in results.items()
        if key not in hidden and isinstance(x, str | int | float)
    ]
    return [text.replace("%", " %") for text in [*known, *others]]
