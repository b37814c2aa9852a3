"""Prints the rank correlation of numbers of the log with the final linear accuracy, over finished runs.

    PYTHONPATH=. python docs/bench/label_free.py RUN RUN RUN …
    PYTHONPATH=. python docs/bench/label_free.py docs/bench/methods.jsonl

The numbers are the last ones in each run's metrics.jsonl. The accuracy is that of RUN/linear-fast, or else of
RUN/linear, at its last step. Spearman's correlation is 1 if a number orders the runs as the accuracy does, -1 if it
orders them the other way round. Runs without the accuracy are named and left out.

For a record of `methods.py` it prints the correlations of its tuning runs with two accuracies on held-out images: the
linear accuracy after the last step, and kNN.
"""

import json
import sys
from pathlib import Path

from scipy.stats import spearmanr

from trainer.report.format import is_number, latest
from trainer.run.results import group_by_step, primary_metric, read_evaluations, read_rows

LABEL_FREE = ("rankme", "alignment", "uniformity", "effective_rank", "feature_std", "loss", "pretext_top1")
WITH_LABELS = ("knn", "probe_top1", "probe_val_top1")  # for comparison


def linear_accuracy(run: Path) -> float | None:
    """Return the linear accuracy of a run at the last step that has one, or None."""
    evaluations = group_by_step(read_evaluations(run))
    for name in ("linear-fast", "linear"):
        if name in evaluations:
            return primary_metric(list(evaluations[name].values())[-1])[1]
    return None


def correlations(runs: list[Path]) -> dict[str, tuple[float, int]]:
    """Return for each number its correlation with the accuracy and the number of runs that have it, at least 3."""
    logs = {run: read_rows(run / "metrics.jsonl") for run in runs}
    found = {}
    for name in LABEL_FREE + WITH_LABELS:
        pairs = [(latest(name, logs[run]), linear_accuracy(run)) for run in runs]
        known = [(x, y) for x, y in pairs if is_number(x) and y is not None]
        if len(known) >= 3:
            found[name] = float(spearmanr(*zip(*known, strict=True)).statistic), len(known)
    return found


def print_record(record: Path) -> None:
    """Print the table of the tuning runs in a record of `methods.py` as Markdown."""
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    # Final runs are longer and have other test images.
    rows = [{**line["last"], "linear": line["linear-fast"]["top1"]} for line in lines if not line["final"]]
    print("| number | linear | kNN | runs |\n| --- | --- | --- | --- |")
    for name in LABEL_FREE + WITH_LABELS:
        known = [row for row in rows if name in row]
        if len(known) >= 3:
            numbers = [row[name] for row in known]
            found = [spearmanr(numbers, [row[key] for row in known]).statistic for key in ("linear", "knn")]
            print(f"| `{name}` | {found[0]:.2f} | {found[1]:.2f} | {len(known)} |")


def main(folders: list[str]) -> None:
    """Print the table as Markdown."""
    if not folders:
        sys.exit("error: got no arguments, need run directories or a record of methods.py")
    if folders[0].endswith(".jsonl"):
        return print_record(Path(folders[0]))
    runs = [Path(folder) for folder in folders]
    if left_out := [str(run) for run in runs if linear_accuracy(run) is None]:
        print(f"without a linear accuracy: {', '.join(left_out)}", file=sys.stderr)
    print("| number | Spearman's correlation with the linear accuracy | runs |\n| --- | --- | --- |")
    for name, (correlation, count) in correlations(runs).items():
        print(f"| `{name}` | {correlation:.2f} | {count} |")


if __name__ == "__main__":
    main(sys.argv[1:])
