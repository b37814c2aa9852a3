"""What a run has recorded: the rows of metrics.jsonl and the results of its evaluations."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from data.settings import RESERVED_NAMES
from trainer.distributed import raise_on_all_ranks
from trainer.run.files import read_json, write_json

log = logging.getLogger(__name__)

Row = dict[str, Any]  # one line of metrics.jsonl

POSITION_KEYS = {"step", "epoch", "images", "seconds"}  # the keys of a row that say when it was written


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a metrics.jsonl; returns [] if the file does not exist.

    A line that is not JSON, because the process was killed while writing it, is skipped with a warning.
    """
    rows = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            log.warning("%s: skipped a line that is not JSON: %.60s", path, text)
    return rows


def more_knn(row: Row) -> dict[str, float]:
    """Return the kNN accuracies on the test images of `data.more_val`, by their name there."""
    named = {key.removeprefix("knn_"): value for key, value in row.items() if key.startswith("knn_")}
    return {name: value for name, value in named.items() if name not in RESERVED_NAMES}


def write_results(path: Path, results: Row | None) -> None:
    """Write a results.json if this rank has results. Called by all ranks.

    Raises ValueError, on all ranks, if the file system refuses.
    """
    error = None
    if results is not None:
        try:
            write_json(path, results)
        except OSError as cause:
            error = f"results not saved: {cause}"
    raise_on_all_ranks(error)


def read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the results of a run's finished evaluations, by the names of their directories."""
    found = {path.parent.name: read_json(path.with_name("results.json")) for path in folder.glob("*/settings.json")}
    return {name: results for name, results in sorted(found.items()) if results}


def group_by_step(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Group evaluations by name and ascending step: `linear-step780` is `linear` at step 780."""
    grouped: dict[str, dict[int, dict[str, Any]]] = {}
    for name, results in sorted(evaluations.items(), key=lambda item: item[1].get("step", 0)):
        step = results.get("step", 0)
        grouped.setdefault(name.removesuffix(f"-step{step}"), {})[step] = results
    return grouped


def primary_metric(results: dict[str, Any]) -> tuple[str, float]:
    """Return name and value of an evaluation's primary metric, which is the first number in its results."""
    return next((name, x) for name, x in results.items() if isinstance(x, int | float) and not isinstance(x, bool))


def evaluation_rows(rows: list[Row], evaluations: dict[str, dict[str, Any]]) -> list[Row]:
    """Convert evaluations of several checkpoints to rows like those of metrics.jsonl, for charts.

    A row has the primary metric under the name of the evaluation. Epoch, images and seconds are interpolated from
    `rows` at the step of the checkpoint. Evaluations of a single checkpoint are not included, and neither are those
    that `rows` has already: kNN is also evaluated in training.
    """
    known = [row for row in rows if row.keys() >= POSITION_KEYS]
    if not known:
        return []
    steps = [row["step"] for row in known]
    converted = []
    for name, by_step in group_by_step(evaluations).items():
        if len(by_step) > 1:
            for step, results in by_step.items():
                position = {key: float(np.interp(step, steps, [row[key] for row in known])) for key in POSITION_KEYS}
                if not any(row["step"] == step and name in row for row in known):
                    converted.append({**position, "step": step, name: primary_metric(results)[1]})
    return converted
