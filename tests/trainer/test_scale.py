"""Scaling studies: the started jobs and their batch sizes, the arithmetic of the table, and a small local study."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.trainer.small import VIT, small_config
from trainer.__main__ import app
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


@pytest.mark.slow
def test_local_processes(tmp_path: Path) -> None:
    arguments = ["--mode", "synthetic", "--steps", "2", "--warmup", "1"]
    write_result(tmp_path, "weak", 1, 10.0)
    lines = list(submit(small(tmp_path), [], tmp_path, [1, 2], ["weak"], True, [], arguments))
    assert lines == [f"measured {tmp_path}/weak-00002.json", f"{tmp_path}/weak-00001.json exists already"]
    result = json.loads((tmp_path / "weak-00002.json").read_text())
    assert (result["ranks"], result["batch_size"]) == (2, 24)


def test_a_local_size_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun is replaced by a script that fails on two processes as torchrun does."""
    script = """#!/bin/sh
case "$*" in
*--nproc-per-node=2*)
    echo 'RuntimeError: CUDA error: out of memory' >&2
    echo 'torch.distributed.elastic.multiprocessing.errors.ChildFailedError:' >&2
    exit 1 ;;
esac
echo 'batch 48 is measured'
"""
    (tmp_path / "python").write_text(script)
    (tmp_path / "python").chmod(0o755)
    config, study = small(tmp_path), tmp_path / "study"
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    result = CliRunner().invoke(
        app, ["scale", "submit", str(config), str(study), "--sizes", "1,2,4", "--kind", "weak", "--local"]
    )
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == f"scale: 1 of 3 sizes failed; their output is in {study}/weak-00002.log"
    assert [line for line in result.output.splitlines() if "weak-" in line] == [
        f"measured {study}/weak-00001.json",
        "weak-00002 failed: RuntimeError: CUDA error: out of memory",
        f"measured {study}/weak-00004.json",
    ]
    assert (study / "weak-00004.log").read_text() == "batch 48 is measured\n"
    assert "ChildFailedError" in (study / "weak-00002.log").read_text()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch is replaced by a script that records its arguments, and squeue by one that prints the file `queue`."""
    programs = {
        "sbatch": f'echo "$CONFIG $*" >> {tmp_path}/calls\nenv | grep ^SLURM >> {tmp_path}/variables\necho 41',
        "squeue": f"cat {tmp_path}/queue",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    ("queue", "submitted"),
    [("41 PENDING\n7 RUNNING\n", False), ("41 RUNNING\n", False), ("40 PENDING\n", True), ("", True)],
)
def test_a_job_that_slurm_still_has_is_not_submitted_again(slurm: Path, queue: str, submitted: bool) -> None:
    (slurm / "queue").write_text(queue)
    config, study = small(slurm), slurm / "study"
    first = list(submit(config, [], study, [2], ["strong"], False, [], []))
    assert first == [f"job 41: 2 nodes, batch 12, {study}/strong-00002.json"]
    again = list(submit(config, [], study, [2], ["strong"], False, [], []))
    state = queue.split()[1:2]
    assert again == (first if submitted else [f"job 41 is {state[0]} already: 2 nodes, {study}/strong-00002.json"])
    assert len((slurm / "calls").read_text().splitlines()) == 1 + submitted
    write_result(study, "strong", 2, 10.0)
    measured = list(submit(config, [], study, [2], ["strong"], False, [], []))
    assert measured == [f"{study}/strong-00002.json exists already"]


def test_sbatch_does_not_get_the_variables_of_salloc(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURM_JOB_ID", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    list(submit(small(slurm), [], slurm / "study", [1], ["weak"], False, [], []))
    assert (slurm / "variables").read_text() == "SLURM_CONF=x\n"


def test_jobs(slurm: Path) -> None:
    tmp_path = slurm
    config, study = small(tmp_path), tmp_path / "study"
    options = (False, ["--partition=gpu"], ["--steps=9"])
    lines = list(submit(config, ["bank.size=60"], study, [3, 1], ["strong", "weak"], *options))
    assert lines[3] == f"job 41: 3 nodes, batch 36, {study}/weak-00003.json"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1] == (
        f"{config} --parsable --nodes=3 --partition=gpu slurm/scaling_study.sh bank.size=60 data.batch_size=12 "
        f"--steps=9 --out {study}/strong-00003.json"
    )
    assert len(calls) == 4
    with pytest.raises(ValueError, match="12 images do not divide among 5"):
        list(submit(config, [], study, [1, 5], ["weak", "strong"], False, [], []))
    assert len((tmp_path / "calls").read_text().splitlines()) == 4, "all sizes are checked before any is submitted"


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not installed; --local measures"):
        list(submit(small(tmp_path), [], tmp_path / "study", [1], ["weak"], False, [], []))
