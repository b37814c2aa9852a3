"""Scripts with fake commands in place of SLURM and ssh: submissions that fail and runs that are interrupted."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

FAKE_SLURM = {
    "sbatch": 'echo sbatch >> calls; echo "7;cluster"',
    "scancel": 'echo "scancel $*" >> calls',
    "scontrol": 'echo "scontrol $*" >> calls',
}


def make_site(folder: Path, commands: dict[str, str]) -> dict[str, str]:
    """Make a copy of the project with empty packages; returns an environment in which the commands are fake."""
    for name in ("trainer", "models", "data", "kernels", "configs", "bin"):
        (folder / name).mkdir()
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    (folder / "slurm" / "env.sh").write_text("")
    (folder / "configs" / "small.yaml").write_text("")
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return environment | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "CONFIG": "configs/small.yaml"}


def run(site: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=60)


def test_a_job_is_released_with_its_code(tmp_path: Path) -> None:
    environment = make_site(tmp_path, FAKE_SLURM)
    (tmp_path / "lines").write_text("optim.lr=0.1\n")
    done = run(tmp_path, environment | {"SWEEP": "lines"}, "slurm/adco_800ep.sh", "--array=1-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Submitted batch job 7, code and configuration as they are now\n"
    assert (tmp_path / "calls").read_text() == "sbatch\nscontrol release 7\n"
    assert [path.name for path in (tmp_path / "runs" / "slurm").iterdir()] == ["7"]
    assert (tmp_path / "runs" / "slurm" / "7" / "code" / "sweep").read_text() == "optim.lr=0.1\n"


@pytest.mark.parametrize("name", ["CONFIG", "SWEEP"])
def test_a_job_whose_files_do_not_exist_is_not_submitted(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, make_site(tmp_path, FAKE_SLURM) | {name: "typo"}, "slurm/adco_800ep.sh", "--array=1-8")
    assert done.returncode == 1
    assert done.stderr == f"error: {name}=typo: no such file in {tmp_path}\n"
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("command", ["cp", "mv"])
def test_a_job_whose_code_cannot_be_copied_is_cancelled(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, make_site(tmp_path, FAKE_SLURM | {command: "exit 1"}), "slurm/adco_800ep.sh")
    assert done.returncode == 1
    assert done.stderr == "error: job 7 could not be prepared: cancelled\n"
    assert (tmp_path / "calls").read_text() == "sbatch\nscancel 7\n"
    assert not list((tmp_path / "runs" / "slurm").glob(".7*"))


@pytest.mark.parametrize("wrong", [{"CONFIG": "typo"}, {"SWEEP": "typo"}, {}])
def test_a_job_that_cannot_copy_its_code_does_not_start(tmp_path: Path, wrong: dict[str, str]) -> None:
    """SLURM runs its own copy of the script, which is called slurm_script."""
    environment = make_site(tmp_path, {} if wrong else {"mv": "exit 1"}) | {"SLURM_JOB_ID": "7", "RUN": "run"} | wrong
    (tmp_path / "slurm" / "run").write_text("touch started")
    (tmp_path / "bin" / "slurm_script").write_text((tmp_path / "slurm" / "adco_800ep.sh").read_text())
    done = run(tmp_path, environment | {"SLURM_SUBMIT_DIR": str(tmp_path)}, "bash", "bin/slurm_script")
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "started").exists()
