"""The harness of all benchmarks: clocks, peak memory, tables on the terminal, and result files.

Times on a machine with other jobs drift by a third within an hour. Implementations that are compared therefore take
alternating turns in one run (`interleave`), which `torch.utils.benchmark` cannot do. GPU kernels are timed by
`triton.testing.do_bench`, which clears the second-level cache before each call.
"""

import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trainer.run.files import write_json

Columns = Mapping[str, Callable[[Any], str]]

WIDTH = 160  # columns of a table that is written to a file instead of a terminal


def seconds(
    action: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of one call, until the device has finished its work."""
    synchronize(device)
    start = clock()
    action()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleave(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure the sides of a comparison in alternating turns.

    Args:
        sides: For each name, a function that takes one turn and returns its measurement.
        repeats: Number of turns of each side.

    Returns:
        The measurements of each side in the order of its turns.
    """
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            turns[name].append(side())
    return turns


def medians(turns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median measurement of each side."""
    return {name: statistics.median(values) for name, values in turns.items()}


def measure_gpu(action: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Measure a call on the current GPU.

    Args:
        action: The call; its first call may compile.
        repeats: Approximate number of timed calls.

    Returns:
        The median seconds, and the largest number of bytes that the call allocates at a time.
    """
    from triton.testing import do_bench  # missing in CPU builds of torch

    action()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    milliseconds = 1e3 * seconds(action, torch.device("cuda"))
    peak = torch.cuda.max_memory_allocated() - allocated
    median: float = do_bench(action, rep=repeats * milliseconds, return_mode="median")
    return median / 1e3, peak


def cpu_peak_bytes(action: Callable[[], object]) -> int:
    """Return the largest number of bytes that a call allocates at a time on the CPU, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocated = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def environment() -> dict[str, Any]:
    """Describe the circumstances of a measurement, for its result file: machine, torch version, date and command."""
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
        },
        "torch": torch.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the kernel does not report one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def print_rows(title: str, columns: Columns, rows: Iterable[Any], text_columns: int = 1) -> None:
    """Print a table with a line for each row; `columns` maps each heading to the function that makes its cell."""
    print_table(title, list(columns), [[cell(row) for cell in columns.values()] for row in rows], text_columns)


def print_table(title: str, headings: Sequence[str], cells: Iterable[Sequence[str]], text_columns: int = 1) -> None:
    """Print a table of cells; the first `text_columns` columns are aligned left. An empty row is a blank line."""
    console = Console(width=max(WIDTH, Console().width))
    if title:
        console.print("", title, sep="\n", style="bold", highlight=False, markup=False)
    table = Table(box=None, show_header=any(headings), pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < text_columns else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def write_result(out: Path | None, result: dict[str, Any]) -> None:
    """Write a benchmark's result as JSON if a file was asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
