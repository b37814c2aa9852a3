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
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(setting: Setting) -> Iterator[Line]:
    """Hang with a descendant, whose process is in the file `descendant`."""
    descendant = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    (setting.folder / "descendant").write_text(str(descendant.pid))
    yield record.holds("first", True, "")
    time.sleep(1000)


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
    descendant = int((tmp_path / "descendant").read_text())
    for _ in range(600):
        if ended(descendant):
            break
        time.sleep(0.1)
    assert ended(descendant)
    printed = capfd.readouterr().out
    assert "4 passed, 3 failed, 1 slow, 0 skipped" in printed
    assert "raises: end: failed: exit code 1: RuntimeError: CUDA error: an illegal [memory] access" in printed


def test_parts_without_time_are_skipped(tmp_path: Path) -> None:
    assert runner.run([Part("good", good, 60)], Setting(torch.device("cpu"), tmp_path), 0)
    (row,) = json.loads((tmp_path / "record.json").read_text())["lines"]
    assert (row["verdict"], row["note"]) == ("skipped", "no time is left: --parts good runs it alone")


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
    assert str(error).startswith("--parts: got 'speed', need some of kernels, losses, host-reads, ")


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
