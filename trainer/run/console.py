"""The dashboard of a run on a terminal: a progress bar with the latest metrics below it."""

import sys

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trainer.run.results import Row, more_knn

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_LENGTH = 40


class Dashboard:
    """Redraws itself in place. Text printed on `console` appears above it."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self.progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self.task = self.progress.add_task("training", total=total, completed=start)
        self.losses: list[float] = []
        self.knn: Row | None = None
        # Text on stderr appears above the dashboard, unless stderr is a file, which keeps it.
        self.live = Live(self.progress, console=console, refresh_per_second=4, redirect_stderr=sys.stderr.isatty())

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        self.progress.update(self.task, completed=step)

    def show(self, row: Row) -> None:
        """Show a row of metrics.jsonl, of training or of the kNN evaluation."""
        if "knn" in row:
            self.knn = row
            return
        self.losses = [*self.losses, row["loss"]][-_CURVE_LENGTH:]
        self.live.update(Group(self.progress, self._table(row)))

    def _table(self, row: Row) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", f"{row['loss']:.3f}  {curve(self.losses)}")
        if self.knn:
            more = "".join(f", {name} {value:.4f}" for name, value in more_knn(self.knn).items())
            table.add_row("kNN", f"{self.knn['knn']:.4f}{more} after epoch {self.knn['epoch']:g}")
        speed = [f"{row['images_per_second']:,.0f} images/s"]
        if "mfu" in row:
            speed.append(f"{row['mfu']:.0%} of the GPU's FLOPs")
        if "data_wait" in row:
            speed.append(f"{row['data_wait']:.1%} waiting for data")
        if "memory_gib" in row:
            speed.append(f"{row['memory_gib']:.1f} GiB")
        table.add_row("speed", ", ".join(speed))
        seconds = {name: phase["seconds"] for name, phase in row.get("phases", {}).items()}
        longest = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:5]
        if longest:
            shares = (f"{name} {seconds[name] / sum(seconds.values()):.0%}" for name in longest)
            table.add_row("step", ", ".join(shares))
        names = (
            "pretext_top1",
            "probe_top1",
            "positive_similarity",
            "hardest_similarity",
            "bank_share",
            "effective_rank",
        )
        if values := ", ".join(f"{name.replace('_', ' ')} {row[name]:.3g}" for name in names if name in row):
            table.add_row("stats", values)
        return table


def curve(values: list[float]) -> str:
    """Draw values as block characters, scaled from the lowest to the highest value."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
