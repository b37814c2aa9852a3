"""Several runs side by side: one table, and accuracy against epochs, images seen and time; in one HTML page.

The page loads nothing from anywhere, as the report; its template is `compare.html.j2`.
"""

import shlex
import sys
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from trainer.config import Config, flatten
from trainer.report.run import format_evaluation, format_percent, format_seconds, is_number, latest, thin
from trainer.run.directory import read_config
from trainer.run.files import read_json, write_atomically
from trainer.run.results import Row, evaluation_rows, group_by_step, read_evaluations, read_rows

POSITIONS = {"epoch": "epochs", "images": "images seen", "hours": "hours"}
# What tells where a run lay and how it was watched, and not what it learned from.
APART = (
    "run.dir",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.keep_every",
    "run.max_minutes",
    "eval.knn_every",
)


class Run(NamedTuple):
    """What a run directory has.

    evaluations: results of other verbs by name, of the last step that each was made of. evaluated: `evaluation_rows`.
    """

    name: str
    config: Config
    rows: list[Row]
    results: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    evaluated: list[Row]

    def accuracies(self, metric: str) -> list[Row]:
        return [row for row in [*self.rows, *self.evaluated] if is_number(row.get(metric))]


def compare(folders: list[Path], out: Path) -> None:
    """Print the table and write the page to `out`. Runs that are not finished count as far as they got.

    Raises ValueError where a folder is not a run, or none of them has an evaluation.
    """
    runs = [read(folder, folders) for folder in folders]
    if not any(run.evaluations or run.accuracies("knn") for run in runs):
        raise ValueError(f"{', '.join(map(str, folders))}: no run has been evaluated yet: nothing to compare")
    columns, rows = tabulate(runs)
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # As wide as it is: lines that a narrow terminal wraps can be read, words cut into letters cannot.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(runs))


def read(folder: Path, folders: list[Path]) -> Run:
    """A run by its folder's name; by the whole path where another of `folders` has the same name."""
    config = read_config(folder)
    alike = [other for other in folders if other.resolve().name == folder.resolve().name]
    name = folder.resolve().name if len(alike) == 1 else str(folder)
    rows, results = read_rows(folder / "metrics.jsonl"), read_json(folder / "results.json")
    found = read_evaluations(folder)
    last = {verb: list(by_step.values())[-1] for verb, by_step in group_by_step(found).items()}
    return Run(name, config, rows, results, last, evaluation_rows(rows, found))


def tabulate(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row of texts for each run."""
    columns = ["run", "method", "epochs", "images", "time", "kNN before", "kNN best", "kNN last"]
    names = sorted({name for run in runs for name in run.evaluations})
    columns += [*names, "feature std", "effective rank"]
    return columns, [_describe(run, names) for run in runs]


def _describe(run: Run, evaluated: list[str]) -> list[str]:
    def number(key: str, form: str) -> str:
        value = latest(key, run.rows)
        return form.format(value) if is_number(value) else ""

    seconds = latest("seconds", run.rows)
    texts = [run.name, run.config.method.name, number("epoch", "{:.4g}"), number("images", "{:,.0f}")]
    texts.append(format_seconds(seconds) if is_number(seconds) else "")
    found = run.accuracies("knn")
    best = max(found, key=itemgetter("knn"), default=None)
    texts += [format_percent(found[0]["knn"]) if found and found[0]["step"] == 0 else ""]
    texts += [f"{format_percent(best['knn'])} (epoch {best['epoch']:.4g})" if best else ""]
    texts += [format_percent(found[-1]["knn"]) if found else ""]
    texts += [format_evaluation(run.evaluations[name]) if name in run.evaluations else "" for name in evaluated]
    return [*texts, number("feature_std", "{:.2f}"), number("effective_rank", "{:.1f}")]


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """The settings in which the runs differ, by key; one text for each run."""
    settings = [flatten(run.config.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values if key not in APART)
    texts = {key: [str(values[key]) if key in values else "" for values in settings] for key in keys}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """For kNN, and what was evaluated at several steps, a chart against each position: a line for each run with it."""
    drawn = []
    names = sorted({name for run in runs for row in run.evaluated for name in row.keys() & run.evaluations})
    for metric, label in {"knn": "kNN", **{name: name for name in names}}.items():
        for position, words in POSITIONS.items():
            lines = []
            for number, run in enumerate(runs):
                rows = [{**row, "hours": row["seconds"] / 3600} for row in run.accuracies(metric)]
                if rows:
                    x, y = thin([(float(row[position]), float(row[metric])) for row in rows])
                    lines.append({"label": run.name, "color": number, "x": x, "y": y})
            if lines:
                drawn.append(
                    {"id": f"{metric}-{position}", "title": f"{label} against {words}", "x": words, "lines": lines}
                )
    return drawn


def render(runs: list[Run]) -> str:
    """The page, as HTML."""
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
    columns, rows = tabulate(runs)
    return environment.get_template("compare.html.j2").render(
        columns=columns,
        rows=rows,
        unfinished=[run.name for run in runs if not run.results],
        names=[run.name for run in runs],
        differences=differences(runs),
        charts=charts(runs),
        plotly=Markup(get_plotlyjs()),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(sys.orig_argv),
    )
