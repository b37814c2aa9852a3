"""Scripts with fake commands in place of SLURM and ssh: submissions that fail and runs that are interrupted."""

import os
import shutil
import signal
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
    return subprocess.run(
        command,
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # bash cannot trap what a parent ignores
    )


def test_a_job_is_released_with_its_code(tmp_path: Path) -> None:
    environment = make_site(tmp_path, FAKE_SLURM)
    (tmp_path / "lines").write_text("optim.lr=0.1\n")
    done = run(tmp_path, environment | {"SWEEP": "lines"}, "slurm/adco_800ep.sh", "--array=1-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Submitted batch job 7, code and configuration as they are now\n"
    assert (tmp_path / "calls").read_text() == "sbatch\nscontrol release 7\n"
    assert [path.name for path in (tmp_path / "runs" / "slurm").iterdir()] == ["7"]
    assert (tmp_path / "runs" / "slurm" / "7" / "code" / "sweep").read_text() == "optim.lr=0.1\n"


def test_a_run_brings_its_own_code(tmp_path: Path) -> None:
    environment = make_site(tmp_path, FAKE_SLURM)
    (tmp_path / "run" / "code").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "code" / "my_method.py").write_text("x = 1\n")
    assert run(tmp_path, environment, "slurm/evaluate.sh", "run.dir=run").returncode == 0
    assert (tmp_path / "runs/slurm/7/code/configs/code/my_method.py").read_text() == "x = 1\n"


@pytest.mark.parametrize("name", ["CONFIG", "SWEEP"])
def test_a_job_whose_files_do_not_exist_is_not_submitted(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, make_site(tmp_path, FAKE_SLURM) | {name: "typo"}, "slurm/adco_800ep.sh", "--array=1-8")
    assert done.returncode == 1
    assert done.stderr == f"error: {name}=typo: no such file in {tmp_path}\n"
    assert not (tmp_path / "calls").exists()


def test_a_job_that_can_neither_be_released_nor_cancelled_is_named(tmp_path: Path) -> None:
    done = run(
        tmp_path, make_site(tmp_path, FAKE_SLURM | {"scontrol": "exit 1", "scancel": "exit 1"}), "slurm/adco_800ep.sh"
    )
    assert done.returncode == 1
    assert done.stderr == "error: job 7 could not be prepared: still held, end it by scancel 7\n"


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


# Each host does what the file `doctor` or `pretrain` says. `interrupt` is Ctrl-C in the terminal of the script.
FAKE_HOSTS = {
    "python": "echo runs/small",
    "ssh": """
        interrupt() { kill -INT $PPID; sleep 0.5; }
        case "$*" in *" doctor "*) source ./doctor ;; *) source ./pretrain ;; esac
    """,
}
WAIT = "until [[ -e runs/small/stop ]]; do sleep 0.05; done"


def train_over_ssh(site: Path, doctor: str, pretrain: str) -> tuple[int, str]:
    """Returns the exit code of slurm/ssh.sh and what the hosts wrote to the file `out`."""
    environment = make_site(site, FAKE_HOSTS)
    (site / "doctor").write_text(doctor)
    (site / "pretrain").write_text(pretrain)
    (site / "hosts").write_text("n1\n")
    done = run(site, environment, "slurm/ssh.sh", "hosts", "configs/small.yaml")
    return done.returncode, (site / "out").read_text() if (site / "out").exists() else ""


def test_an_interrupt_of_the_preflight_does_not_stop_the_next_run(tmp_path: Path) -> None:
    assert train_over_ssh(tmp_path, "interrupt", "echo trained >> out") == (0, "")
    assert not (tmp_path / "runs" / "small" / "stop").exists()


def test_an_interrupt_makes_the_ranks_save_and_stop(tmp_path: Path) -> None:
    pretrain = f"interrupt; {WAIT}; rm runs/small/stop; echo saved >> out"
    assert train_over_ssh(tmp_path, "true", pretrain) == (0, "saved\n")
    assert not (tmp_path / "runs" / "small" / "stop").exists()


def test_a_second_interrupt_does_not_stop_the_next_run(tmp_path: Path) -> None:
    """It comes when the ranks have deleted the file and are saving."""
    pretrain = f"interrupt; {WAIT}; rm runs/small/stop; interrupt; {WAIT}; echo saved >> out"
    assert train_over_ssh(tmp_path, "true", pretrain) == (0, "saved\n")
    assert not (tmp_path / "runs" / "small" / "stop").exists()


def test_a_stop_of_the_user_stays(tmp_path: Path) -> None:
    """Nothing was trained that could have seen it."""
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "stop").touch()
    assert train_over_ssh(tmp_path, "interrupt", "true") == (0, "")
    assert (tmp_path / "runs" / "small" / "stop").exists()
