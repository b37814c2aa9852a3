"""Scaling studies: the started jobs and their batch sizes, the arithmetic of the table, and a small local study."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.small import VIT, small_config
from trainer.bench.scaling import collect, plot, report, submit
from trainer.config_file import dump


def write_result(folder: Path, kind: str, ranks: int, speed: float, **figures: Any) -> None:
    mode = {"images_per_second": speed, "images_per_second_per_rank": speed / ranks, "data_wait": 0.01, **figures}
    result = {"nodes": -(-ranks // 8), "ranks": ranks, "batch_size": 64 * ranks, "modes": {"full": mode}}
    (folder / f"{kind}-{ranks:05d}.json").write_text(json.dumps(result))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ranks, speed in ((32, 2400.0), (8, 800.0), (16, 1500.0)):
        write_result(tmp_path, "weak", ranks, speed, communication=0.25)
    write_result(tmp_path, "strong", 1, 100.0)
    points = collect(tmp_path)
    assert [(p.kind, p.ranks, p.nodes) for p in points] == [
        ("strong", 1, 1), ("weak", 8, 1), ("weak", 16, 2), ("weak", 32, 4)
    ]  # fmt: skip
    assert [p.speedup for p in points] == [1, 1, 1.875, 3]
    assert [p.linear for p in points] == [1, 1, 2, 4]
    assert [p.efficiency for p in points] == [1, 1, 0.9375, 0.75]
    report(tmp_path)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["weak", "4", "32", "2,048", "2,400", "75.0", "3.00", "4", "75.0", "%", "25.0", "%", "1.0", "%"]
    assert len(json.loads((tmp_path / "scaling.json").read_text())["points"]) == 4
    png, html = plot(tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<td>93.8 %</td>" in html.read_text()


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results of a scaling study"):
        collect(tmp_path)


def small(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(dump(small_config(folder / "run", Path("none"), model=VIT, bank={"size": 30, "init": "random"})))
    return path


def test_local_processes(tmp_path: Path) -> None:
    arguments = ["--mode", "synthetic", "--steps", "2", "--warmup", "1"]
    write_result(tmp_path, "weak", 1, 10.0)
    lines = submit(small(tmp_path), [], tmp_path, [1, 2], ["weak"], True, [], arguments)
    assert lines == [f"measured {tmp_path}/weak-00002.json", f"{tmp_path}/weak-00001.json exists already"]
    result = json.loads((tmp_path / "weak-00002.json").read_text())
    assert (result["ranks"], result["batch_size"]) == (2, 24)


def test_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch is replaced by a script that records its arguments."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$CONFIG $*" >> {tmp_path}/calls\necho 41\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    config, study = small(tmp_path), tmp_path / "study"
    lines = submit(
        config, ["bank.size=60"], study, [3, 1], ["strong", "weak"], False, ["--partition=gpu"], ["--steps=9"]
    )
    assert lines[3] == f"job 41: 3 nodes, batch 36, {study}/weak-00003.json"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1] == (
        f"{config} --parsable --nodes=3 --partition=gpu slurm/scaling_study.sh bank.size=60 data.batch_size=12 "
        f"--steps=9 --out {study}/strong-00003.json"
    )
    assert len(calls) == 4
    with pytest.raises(ValueError, match="12 images do not divide among 5"):
        submit(config, [], study, [5], ["strong"], False, [], [])


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not installed; --local measures"):
        submit(small(tmp_path), [], tmp_path / "study", [1], ["weak"], False, [], [])
