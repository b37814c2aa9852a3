"""Numbers as the text that reports, tables and model cards show."""

import json
from typing import Any

from trainer.run.results import Row, primary_metric

METRIC_LABELS = {"map": "mAP"}  # metrics that are named beside their value; the others are accuracies


def is_number(value: object) -> bool:
    """Return whether the value is a number that can be charted; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def latest(key: str, rows: list[Row]) -> Any:
    """Returns the value of the last row that has the key, or None."""
    return next((row[key] for row in reversed(rows) if key in row), None)


def format_percent(value: float) -> str:
    """Formats a fraction: 0.829 is 82.9 %."""
    return f"{100 * value:.1f} %"


def format_seconds(seconds: float) -> str:
    """Formats a duration by its two largest units: 3 s, 2 min 5 s, 3 h 20 min, 2 d 4 h."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {total % 60} s"
    return f"{total} s"


def format_value(value: object) -> str:
    """Formats any value of results.json."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def format_evaluation(results: dict[str, Any]) -> str:
    """Formats the main result of an evaluation, with its standard deviation over seeds if there is one."""
    metric, value = primary_metric(results)
    deviation = results.get(f"{metric}_deviation")
    if not 0 <= value <= 1:
        return f"{metric} {value:.4g}"
    text = format_percent(value) + (f" ± {100 * deviation:.1f}" if deviation is not None else "")
    return f"{METRIC_LABELS[metric]} {text}" if metric in METRIC_LABELS else text
