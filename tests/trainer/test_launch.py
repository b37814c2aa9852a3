"""Variables of torchrun and SLURM that a shell still has, ports in use, the limit of open files, and slurm/node.sh."""

import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.batchnorm import synchronise_bn
from tests.processes import start_ranks
from tests.ranks import run_ranks
from trainer import distributed
from trainer.distributed import files_needed, process_group, raise_file_limit
from trainer.ops.doctor import run_checks
from trainer.ops.node_checks import find_problems
from trainer.ops.stop import StopHandler, deadline
from trainer.run.checkpoint import Saver

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NODE = Path(__file__).parents[2] / "slurm" / "node.sh"
TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "SLURM_STEP_NUM_TASKS", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 with no WORLD_SIZE: RANK must be less than WORLD_SIZE. Start several ranks with"),
        ({"RANK": "2", "WORLD_SIZE": ""}, "RANK=2 with no WORLD_SIZE"),
        ({**TWO, "RANK": "2"}, "RANK=2 with WORLD_SIZE=2: RANK must be less than WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({"RANK": "-1"}, "RANK=-1 is not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 and LOCAL_WORLD_SIZE=1: need 1 or more"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK and MASTER_ADDR and MASTER_PORT not set"),
        ({**TWO, "MASTER_ADDR": ""}, "WORLD_SIZE=2, but MASTER_ADDR not set"),
        ({**TWO, "MASTER_PORT": "ssh"}, "MASTER_PORT=ssh is not the number of a port"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not the number of a port"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 with no LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 is more than WORLD_SIZE=1"),
    ],
)
def test_variables_that_contradict_each_other(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), process_group("cpu"):
        pass


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": " "},
        {"RANK": "0"},
        {"MASTER_ADDR": "nowhere", "MASTER_PORT": ""},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "64", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "8"},
    ],
)
def test_variables_that_do_no_harm(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with process_group("cpu") as rank_info:
        assert rank_info == (torch.device("cpu"), 0, 1, 1, 0)
    assert not caplog.records


def test_several_tasks_of_srun_are_several_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with process_group("cpu"):
        pass
    assert "srun has started 8 tasks, and each is a run of its own" in caplog.text


def test_an_end_of_a_job_that_is_not_a_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    assert deadline(None, 1000.5) is None
    assert deadline(2, 1000.5) == 1120.5
    assert caplog.text.count("SLURM_JOB_END_TIME=Unknown is not a time: ignored") == 1


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {**TWO, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        message = f"rank 0 of 2 at 127.0.0.1:{port} cannot join the other ranks: another program uses this port"
        with pytest.raises(ValueError, match=message), process_group("cpu"):
            pass


# Open files


@pytest.fixture
def soft_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("soft_limit")
def test_the_soft_limit_is_raised() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with process_group("cpu"):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == raise_file_limit() == min(hard, 2**20)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def count_files(folder: Path) -> int:
    """Return the files that the groups of a training loop open on this rank, beside those of one rank alone."""
    synchronise_bn(nn.Sequential(nn.BatchNorm1d(2)), torch.device("cpu"))
    with StopHandler(folder), Saver(folder, keep=1):
        dist.barrier()
        return open_files()


def test_a_run_connects_each_rank_to_every_other_one_three_times(tmp_path: Path) -> None:
    """The groups are the default one, that of checkpoints and that of BatchNorm; other files cancel out."""
    two, five = (max(run_ranks(world_size, count_files, tmp_path)) for world_size in (2, 5))
    assert five - two == (5 - 2) * distributed._GLOO_GROUPS
    assert five < files_needed(5)


@pytest.mark.parametrize(("limit", "enough"), [(60, False), (20_000, True)])
def test_a_hard_limit_that_is_too_low_is_reported(limit: int, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    for name, value in {**TWO, "WORLD_SIZE": "512"}.items():
        monkeypatch.setenv(name, value)
    problems = [problem for problem in find_problems(None) if "open files" in problem]
    text = f"at most {limit} open files (ulimit -Hn), but 512 ranks need up to {files_needed(512)} in a process"
    assert problems == ([] if enough else [text])
    (check,) = (check for check in run_checks(None) if check.name == "open files")
    assert check.state == ("ok" if enough else "missing")


def make_groups(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    with process_group("cpu"):
        for _ in range(20):
            dist.new_group(backend="gloo")
        dist.barrier()


def test_more_connections_than_the_soft_limit_allows() -> None:
    assert [rank.wait(120) for rank in start_ranks(2, make_groups, 64)] == [0, 0]


# slurm/node.sh


def node_variables(tmp_path: Path, prefix: str = "", **variables: str) -> dict[str, str]:
    """Return the environment that slurm/node.sh gives to its command; `limit` is the limit of open files."""
    clean = {name: os.environ[name] for name in ("PATH",)}
    command = f'{prefix} exec bash {NODE} bash -c "env; echo limit=\\$(ulimit -Sn)/\\$(ulimit -Hn)"'
    environment = {**clean, "TMPDIR": str(tmp_path), **variables}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_a_node_gets_limits_caches_and_allocator(tmp_path: Path) -> None:
    found = node_variables(tmp_path, "ulimit -Sn 100; ulimit -Hn 200;")
    cache = tmp_path / f"trainer-{os.getuid()}"
    assert found["limit"] == "200/200"
    assert found["TRITON_CACHE_DIR"] == f"{cache}/triton"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == f"{cache}/inductor"
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["PET_SHUTDOWN_TIMEOUT"] == "600"
    assert cache.stat().st_mode & 0o777 == 0o700
    assert node_variables(tmp_path)["TRITON_CACHE_DIR"] == f"{cache}/triton"  # again, in the folder that is there now
    (tmp_path / "job").mkdir()
    assert node_variables(tmp_path, SLURM_TMPDIR=f"{tmp_path}/job")["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/job/")


def test_a_node_keeps_what_the_site_has_set(tmp_path: Path) -> None:
    found = node_variables(
        tmp_path, TRITON_CACHE_DIR="/a", PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync", PET_SHUTDOWN_TIMEOUT="9"
    )
    assert found["TRITON_CACHE_DIR"] == "/a"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/trainer-{os.getuid()}/inductor"
    assert "PYTORCH_ALLOC_CONF" not in found
    assert found["PET_SHUTDOWN_TIMEOUT"] == "9"
    assert node_variables(tmp_path, PYTORCH_ALLOC_CONF="backend:native")["PYTORCH_ALLOC_CONF"] == "backend:native"


@pytest.mark.parametrize("kind", ["link", "file", "no folder"])
def test_compiled_kernels_are_only_taken_from_a_folder_of_ones_own(kind: str, tmp_path: Path) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    mine.mkdir()
    cache = other / f"trainer-{os.getuid()}"
    if kind != "no folder":
        other.mkdir()
    if kind == "link":
        cache.symlink_to(mine)
    elif kind == "file":
        cache.touch()
    found = node_variables(mine, SLURM_TMPDIR=str(other))
    assert found["TRITON_CACHE_DIR"] == f"{mine}/trainer-{os.getuid()}/triton"
