"""Compares runs in a table on the terminal and in a self-contained HTML page.

The page has the table, the accuracies against epochs, images seen and time, and the settings that differ.
"""

from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from trainer.config import Config
from trainer.config_file import flatten
from trainer.external import short_name
from trainer.report.charts import Chart, Drawing, draw_chart, draw_points
from trainer.report.format import format_evaluation, format_percent, format_seconds, is_number, latest
from trainer.report.page import render_page
from trainer.run.directory import read_config
from trainer.run.files import read_json, write_atomically
from trainer.run.results import Row, evaluation_rows, group_by_step, more_knn, read_evaluations, read_rows

POSITIONS = {"epoch": "epochs", "images": "images seen", "hours": "hours"}  # x axes and their titles
# Settings of where a run is stored and how it is logged and saved, which do not change what it learns.
IGNORED_SETTINGS = (
    "run.dir",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.keep_every",
    "run.max_minutes",
    "eval.knn_every",
)


class Run(NamedTuple):
    """The content of a run directory.

    `evaluations` holds the results of each evaluation for the last step that it was made of; `evaluated` holds the
    evaluations of several steps as rows.
    """

    name: str
    config: Config
    rows: list[Row]
    results: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    evaluated: list[Row]

    def accuracies(self, metric: str) -> list[Row]:
        """Returns the rows that have the metric, by step."""
        found = [row for row in [*self.rows, *self.evaluated] if is_number(row.get(metric))]
        return sorted(found, key=itemgetter("step"))


def compare(folders: list[Path], out: Path) -> None:
    """Prints the table and writes the page to `out`. Runs may be unfinished.

    Raises:
        ValueError: A folder is not a run directory, or none of the runs has been evaluated.
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
    # A narrow terminal wraps the lines, which is easier to read than columns cut into letters.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)
    page = render_page(
        "compare.html.j2",
        columns=columns,
        rows=rows,
        unfinished=[run.name for run in runs if not run.results],
        names=[run.name for run in runs],
        differences=differences(runs),
        charts=charts(runs),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def read(folder: Path, folders: list[Path]) -> Run:
    """Reads a run, which is named after its folder, or by its path if another of `folders` has the same name."""
    config = read_config(folder)
    same_name = [other for other in folders if other.resolve().name == folder.resolve().name]
    name = folder.resolve().name if len(same_name) == 1 else str(folder)
    rows, results = read_rows(folder / "metrics.jsonl"), read_json(folder / "results.json")
    found = read_evaluations(folder)
    last = {evaluation: list(by_step.values())[-1] for evaluation, by_step in group_by_step(found).items()}
    return Run(name, config, rows, results, last, evaluation_rows(rows, found))


def tabulate(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Returns the table's column names, and one row of texts per run."""
    names = sorted({name for run in runs for name in run.evaluations})
    rows = [_describe(run, names, _more_knn(runs)) for run in runs]
    return [column for column, _ in rows[0]], [[text for _, text in row] for row in rows]


def _describe(run: Run, evaluated: list[str], more: list[str]) -> list[tuple[str, str]]:
    """Returns column names and texts of a run's row; a text is '' if the run has no such value."""

    def number(key: str, form: str) -> str:
        value = latest(key, run.rows)
        return form.format(value) if is_number(value) else ""

    def percent(key: str) -> str:
        value = latest(key, run.rows)
        return format_percent(value) if is_number(value) else ""

    seconds, knn = latest("seconds", run.rows), run.accuracies("knn")
    best = max(knn, key=itemgetter("knn"), default=None)
    return [
        ("run", run.name),
        ("method", short_name(run.config.method.name)),
        ("epochs", number("epoch", "{:.4g}")),
        ("images", number("images", "{:,.0f}")),
        ("time", format_seconds(seconds) if is_number(seconds) else ""),
        ("kNN before", format_percent(knn[0]["knn"]) if knn and knn[0]["step"] == 0 else ""),
        ("kNN best", f"{format_percent(best['knn'])} (epoch {best['epoch']:.4g})" if best else ""),
        ("kNN last", format_percent(knn[-1]["knn"]) if knn else ""),
        *((f"kNN {name}", percent(f"knn_{name}")) for name in more),
        ("probe", percent("probe_val_top1")),
        *((name, format_evaluation(run.evaluations[name]) if name in run.evaluations else "") for name in evaluated),
        ("feature std", number("feature_std", "{:.2f}")),
        ("effective rank", number("effective_rank", "{:.1f}")),
    ]


def _more_knn(runs: list[Run]) -> list[str]:
    """Returns the names of the further validation images on which runs have a kNN accuracy."""
    return sorted({name for run in runs for row in run.rows for name in more_knn(row)})


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Returns the settings in which the runs differ: by key, the value of each run as text."""
    settings = [flatten(run.config.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values if key not in IGNORED_SETTINGS)
    texts = {key: [str(values[key]) if key in values else "" for values in settings] for key in keys}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def charts(runs: list[Run]) -> list[Drawing]:
    """Draws kNN, and each evaluation of several steps, against each position, with a line per run that has it."""
    names = sorted({name for run in runs for row in run.evaluated for name in row.keys() & run.evaluations})
    drawings = []
    labels = {"knn": "kNN", **{f"knn_{name}": f"kNN {name}" for name in _more_knn(runs)}}
    for metric, label in {**labels, **{name: name for name in names if name != "knn"}}.items():
        for position, title in POSITIONS.items():
            lines = []
            for number, run in enumerate(runs, start=1):
                rows = [{**row, "hours": row["seconds"] / 3600} for row in run.accuracies(metric)]
                if points := draw_points(rows, position, metric):
                    lines.append({"label": run.name, "axis": 1, "color": number, **points})
            if lines:
                chart = Chart("Accuracy", f"{label} against {title}", "", percent=(1,))
                drawings.append(draw_chart(chart, f"{metric}-{position}", title, lines, compares_runs=True))
    return drawings
