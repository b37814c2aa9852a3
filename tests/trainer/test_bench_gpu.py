"""`bench gpu`: its runner with parts that crash and hang, its comparisons, and all of its parts on the CPU.

The Triton kernels are checked in `tests/kernels/triton_bench.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.bench.gpu import parts, ranks, record, runner, runs, speed, trajectory
from trainer.bench.gpu.record import Line, Setting
from trainer.bench.gpu.runner import Part
from trainer.config import Config
from trainer.plan import roofline
from trainer.plan.hardware import GPUS


def good(setting: Setting) -> Iterator[Line]:
    yield record.at_most("error", 1.0, 2.0, "of nothing", "s")
    yield record.in_time("time", 3.0, 2.0, "the bound")


def raises(setting: Setting) -> Iterator[Line]:
    yield record.holds("first", True, "")
    raise RuntimeError("CUDA error: an illegal [memory] access")


def crashes(setting: Setting) -> Iterator[Line]:
    yield record.holds("first", True, "")
    launch(setting.folder / "crashed")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(setting: Setting) -> Iterator[Line]:
    launch(setting.folder / "hung")
    yield record.holds("first", True, "")
    time.sleep(1000)


LAUNCHER = """
import subprocess, time
rank = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(1000)
"""


def launch(path: Path) -> None:
    """Start a process that starts another in a session of its own, as torchrun does, and write the numbers of both."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    path.write_text(f"{launcher.pid} {launcher.stdout.readline()}")


def end(path: Path) -> bool:
    """Return whether both processes of `launch` end within a minute."""
    processes = [int(number) for number in path.read_text().split()]
    for _ in range(600):
        if all(map(ended, processes)):
            break
        time.sleep(0.1)
    return len(processes) == 2 and all(map(ended, processes))


def ended(process: int) -> bool:
    """Return whether a process has ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_part_that_crashes_or_hangs_does_not_stop_the_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ("raises", "crashes", "hangs")
    chosen = [Part(name, function, 600) for name, function in zip(names, (raises, crashes, hangs), strict=True)]
    # Long enough for its first line on a slow machine.
    chosen[2] = Part("hangs", hangs, 15)
    assert not runner.run([*chosen, Part("good", good, 600)], Setting(torch.device("cpu"), tmp_path), 1200)
    rows = json.loads((tmp_path / "record.json").read_text())["lines"]
    assert rows == [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(row["part"], row["name"], row["verdict"]) for row in rows] == [
        *(("raises", "first", "passed"), ("raises", "end", "failed")),
        *(("crashes", "first", "passed"), ("crashes", "end", "failed")),
        *(("hangs", "first", "passed"), ("hangs", "time", "failed")),
        *(("good", "error", "passed"), ("good", "time", "slow")),
    ]
    assert rows[1]["note"] == "exit code 1: RuntimeError: CUDA error: an illegal [memory] access"
    assert rows[3]["note"].startswith("killed by SIGSEGV")
    assert "Traceback" in (tmp_path / "raises.log").read_text()
    assert end(tmp_path / "crashed")
    assert end(tmp_path / "hung")
    printed = capfd.readouterr().out
    assert "4 passed, 3 failed, 1 slow, 0 skipped" in printed
    assert "raises: end: failed: exit code 1: RuntimeError: CUDA error: an illegal [memory] access" in printed


def test_parts_without_time_are_skipped(tmp_path: Path) -> None:
    assert runner.run([Part("good", good, 60)], Setting(torch.device("cpu"), tmp_path), 0)
    (row,) = lines_of(tmp_path)
    assert (row["verdict"], row["note"]) == ("skipped", "no time is left: --parts good runs it alone")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a record, which are in both files."""
    rows: list[dict[str, Any]] = json.loads((folder / "record.json").read_text())["lines"]
    assert rows == [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    return rows


def test_a_part_that_the_time_for_all_parts_cuts_short_is_skipped(tmp_path: Path) -> None:
    assert runner.run([Part("hangs", hangs, 600)], Setting(torch.device("cpu"), tmp_path), 15)
    first, row = lines_of(tmp_path)
    assert (first["verdict"], row["name"], row["verdict"]) == ("passed", "time", "skipped")
    assert row["note"] == "the time for all parts was over after 15 s of this one: --parts hangs runs it alone"
    assert end(tmp_path / "hung")


def test_multi_gpu_parts_come_before_those_that_only_measure() -> None:
    assert [part.name for part in parts.PARTS][:4] == ["kernels", "losses", "ranks", "killed-rank"]


def test_parts_that_run_again_replace_their_own_lines_only(tmp_path: Path) -> None:
    setting = Setting(torch.device("cpu"), tmp_path)
    runner.run([Part("a", good, 600), Part("b", good, 600)], setting, 1200)
    before = lines_of(tmp_path)
    assert not runner.run([Part("a", raises, 600)], setting, 1200)
    assert [(row["part"], row["name"]) for row in lines_of(tmp_path)] == [
        ("b", "error"), ("b", "time"), ("a", "first"), ("a", "end")
    ]  # fmt: skip
    assert lines_of(tmp_path)[:2] == before[2:]
    # The failed line is not of this run.
    assert runner.run([Part("c", good, 600)], setting, 0)
    assert [row["part"] for row in lines_of(tmp_path)] == ["b", "b", "a", "a", "c"]
    assert runner.run([Part("b", good, 600)], setting, 0)  # gets no time
    assert [(row["part"], row["verdict"]) for row in lines_of(tmp_path)][:2] == [("b", "passed"), ("b", "slow")]


def test_an_interrupted_run_keeps_the_lines_of_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_part(part: Part, *_: Any) -> Iterator[Line]:
        yield record.holds(f"{part.name} {len(starts)}", True, "")
        if part.name == "b" and len(starts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_part", run_part)
    starts: list[int] = []
    chosen, setting = [Part(name, good, 60) for name in "ab"], Setting(torch.device("cpu"), tmp_path)
    starts.append(1)
    runner.run(chosen, setting, 60)
    starts.append(2)
    with pytest.raises(KeyboardInterrupt):
        runner.run(chosen, setting, 60)
    assert [row["name"] for row in json.loads((tmp_path / "record.json").read_text())["lines"]] == ["b 1", "a 2"]
    streamed = [json.loads(line)["name"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert streamed == ["b 1", "a 2", "b 2"]


def test_a_record_of_other_versions_is_not_extended(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    setting, chosen = Setting(torch.device("cpu"), tmp_path), [Part("good", good, 60)]
    runner.run(chosen, setting, 0)
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    before = path.read_text()
    with pytest.raises(ValueError, match=r"record.json has torch 1.0, this machine .*: give another --out"):
        runner.run(chosen, setting, 0)
    assert path.read_text() == before


def test_a_second_full_run_does_not_erase_a_record(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    error = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--out", str(tmp_path)]).exception
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"--out: {tmp_path} has a record already: give another folder, or delete it")
    assert (tmp_path / "record.json").read_text() == "{}"


def test_verdicts() -> None:
    assert record.at_most("", 1.0, 1.0, "").verdict == "passed"
    assert record.at_most("", float("nan"), 1.0, "").verdict == "failed"
    assert record.fast_enough("", 0.9, 1.0, "").verdict == "slow"
    assert record.fast_enough("", 1.0, 1.0, "").verdict == "passed"
    assert record.holds("", False, "").verdict == "failed"


def test_gaps_between_kernels() -> None:
    spans = [(0.0, 10.0, "a"), (2.0, 5.0, "b"), (12.0, 13.0, "c"), (13.0, 14.0, "d"), (20.0, 21.0, "e")]
    assert speed.find_gaps(spans) == [(2.0, "c"), (6.0, "e")]


def test_differences_of_trajectories() -> None:
    assert trajectory.difference([1.0, 4.5], [1.0, 5.0]) == pytest.approx(0.1)
    assert trajectory.mean_difference([1.0, 4.0], [2.0, 3.0]) == 0


def test_runs_on_a_gpu_do_not_need_dali(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`auto` would be DALI, which the core installation lacks."""
    config = runs._run_config(Setting(torch.device("cuda"), tmp_path), tmp_path, tmp_path)
    assert config.data.backend_for(torch.device("cuda")) == "cpu"
    found: list[Config] = []

    def launched(config: Config) -> str:
        found.append(config)
        raise InterruptedError

    monkeypatch.setattr(ranks, "dump", launched)
    with pytest.raises(InterruptedError):
        next(ranks.check_killed_rank(Setting(torch.device("cpu"), tmp_path)))
    assert found[0].data.backend_for(torch.device("cuda")) == "cpu"


@pytest.mark.slow
def test_all_parts_on_the_cpu(tmp_path: Path) -> None:
    """Every line of every part runs; only times may be slow."""
    result = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "record.json").read_text())["lines"]
    assert [row for row in rows if row["verdict"] == "failed"] == []
    assert result.exit_code == 0
    assert {row["part"] for row in rows} == {part.name for part in parts.PARTS}
    for part in parts.PARTS:
        mine = [row for row in rows if row["part"] == part.name]
        # The planner cannot predict a CPU's times, and reads by the host are not seen.
        skipped = part.name in ("throughput", "host-reads")
        assert skipped or any(row["verdict"] in ("passed", "slow") for row in mine), part.name
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


@pytest.mark.parametrize("command", [["gpu"], ["kernels", "--tune"]])
def test_without_a_gpu(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = CliRunner().invoke(app, ["bench", *command]).exception
    assert isinstance(error, ValueError)
    assert "got a machine without a CUDA device" in str(error)


def test_unknown_parts_are_refused() -> None:
    error = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--parts", "losses,speed"]).exception
    assert isinstance(error, ValueError)
    assert str(error).startswith("--parts: got 'speed', need some of kernels, losses, ranks, ")


def test_static_and_tune_exclude_each_other() -> None:
    error = CliRunner().invoke(app, ["bench", "kernels", "--static", "--tune"]).exception
    assert isinstance(error, ValueError)


def test_roofline() -> None:
    score = roofline.score(GPUS["a100"], 4096, 65536, 128, "bfloat16")
    assert score.flops == 4 * 4096 * (4096 + 65536) * 128
    assert score.seconds == pytest.approx(468e-6, rel=1e-2)
    assert score.limit == "tensor cores"
    few = roofline.adversary(GPUS["h100"], 256, 2**20, 128, "bfloat16")
    assert few.bytes == pytest.approx(2**20 * 128 * (4 + 8 + 8), rel=1e-2)  # n, W and v, read and written
    assert few.limit == "memory"
    assert few.seconds == few.bytes / 3350e9
    low = roofline.adversary(GPUS["h100"], 256, 2**20, 128, "bfloat16", w_bytes=2, v_bytes=0)
    assert low.bytes == pytest.approx(2**20 * 128 * 8, rel=2e-2)
    wide = roofline.score(GPUS["a100"], 4096, 65536, 128, "float32")
    assert wide.tensor_seconds == pytest.approx(6 * score.tensor_seconds)  # three products at half the rate


def test_roofline_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.report(roofline.rows((256,), (65536,), 128, "bfloat16"))
    printed = capsys.readouterr().out
    assert "A100 80 GB" in printed
    assert "H100 SXM" in printed
    assert "tensor cores" in printed
