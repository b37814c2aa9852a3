"""Nodes that are compared before a job trains: what is found, and who is blamed."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.trainer.small import PYTHON, small_config, write_images
from trainer.config_file import dump
from trainer.ops.preflight import Fault, NodeReport, _Exchange, _problems, _unreachable, find_faults

ROOT = Path(__file__).parents[2]


def node(name: str, **changes: Any) -> NodeReport:
    fit = NodeReport(
        name, {"Python": "3.11.7", "package timm": "1.0.31"}, [], 0.0, 100.0, [], {"matmul TFLOP/s": 200.0}
    )
    return fit._replace(**changes)


def nodes(**changes: Any) -> list[NodeReport]:
    """n1, n2 and n3, of which n2 has these."""
    return [node("n1"), node("n2", **changes), node("n3")]


def test_nodes_that_are_alike() -> None:
    assert find_faults(nodes()) == []
    assert find_faults(nodes(clock=3.0, memory=50.0, speeds={"matmul TFLOP/s": 90.0})) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"problems": ["data.train: /data does not exist"]}, "data.train: /data does not exist"),
        (
            {"same": {"Python": "3.11.2"}},
            "Python 3.11.2, but 3.11.7 on 2 of 3 nodes; package timm absent, but 1.0.31 on 2 of 3 nodes",
        ),
        ({"clock": -65.0}, "its clock is -65.0 s from the others'"),
        ({"unreachable": ["n1", "n3"]}, "n2 cannot connect to 2 nodes"),
        ({"speeds": {"matmul TFLOP/s": 60.0}}, "matmul TFLOP/s: 60, the median of the nodes is 200"),
    ],
)
def test_the_one_that_is_not_is_named(changes: dict[str, Any], text: str) -> None:
    assert find_faults(nodes(**changes)) == [Fault("n2", text)]


def test_one_that_nobody_reaches_is_blamed_and_not_the_others() -> None:
    faults = find_faults([node("n1", unreachable=["n2"]), node("n2"), node("n3", unreachable=["n2"])])
    assert {fault.node for fault in faults} == {"n2", None}
    assert any(fault.text.startswith("2 nodes cannot connect to it; GLOO_SOCKET_IFNAME") for fault in faults)


def test_two_that_differ_are_both_shown_and_none_is_blamed() -> None:
    (fault,) = find_faults([node("n1"), node("n2", same={"Python": "3.11.7", "package timm": "0.1"})])
    assert fault == Fault(None, "package timm 1.0.31 on n1, 0.1 on n2")


def test_many_differences_take_one_line() -> None:
    same = {f"package p{i}": "1" for i in range(40)}
    (fault,) = find_faults([node("n1", same=same), node("n2", same={}), node("n3", same=same)])
    assert fault.text.endswith("; and 35 more")


def test_a_node_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.ops.preflight._WAIT", 0.4)
    exchange = _Exchange(dist.HashStore(), 0, 2, True)
    exchange.names = ["n1", "n2"]
    with pytest.raises(ValueError, match=r"of 2 nodes these have not told their facts in 0\.2 s: n2"):
        exchange.all("facts", lambda: 1)


def test_nodes_that_cannot_be_reached() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as there, closing(socket.create_server(("", 0))) as gone:
        closed = gone.getsockname()[1]
        gone.close()
        assert _unreachable([("n1", "127.0.0.1", there.getsockname()[1]), ("n2", "127.0.0.1", closed)]) == ["n2"]


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, str]:
    """An environment with an `ssh` for which every host is this machine; at its end, what it started gets a hangup."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == -* ]]; do [[ $1 != -o ]] || shift; shift; done\n"
        "shift\n"
        'setsid bash -c "$*" &\n'
        "trap 'kill -HUP -- -$!; exit 255' TERM\n"
        "wait $!\n"
    )
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("localhost\n127.0.0.1\n")
    images = write_images(tmp_path / "images")
    run = {"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"}
    (tmp_path / "config.yaml").write_text(dump(small_config(tmp_path / "run", images, run=run)))
    path = f"{ssh.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RANKS": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="slurm/env.sh names .venv, which is not here")
def test_two_hosts_over_ssh(tmp_path: Path, hosts: dict[str, str]) -> None:
    def start(*settings: str) -> subprocess.CompletedProcess[str]:
        command = ["slurm/ssh.sh", str(tmp_path / "hosts"), str(tmp_path / "config.yaml"), *settings]
        return subprocess.run(command, cwd=ROOT, env=hosts, capture_output=True, text=True, timeout=200)

    done = start()
    assert done.returncode == 0, done.stderr
    assert "2 nodes, 2 ranks; GPUs none" in done.stdout
    assert "preflight: all nodes are fit" in done.stdout
    assert (tmp_path / "run" / "results.json").exists()
    done = start("data.train=/nowhere", f"run.dir={tmp_path}/other")
    assert done.returncode == 1
    assert done.stdout.count("data.train: /nowhere does not exist") == 2
    assert "error: doctor has failed" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_gpu_job_that_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", each=8)
    auto, cpu = (small_config(tmp_path / "run", images, run={"device": device}) for device in ("auto", "cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _problems(auto) == []
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert _problems(auto) == ["sees 0 GPUs for 2 ranks"]
    assert _problems(cpu) == []


def test_config_prints_what_runs(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", tmp_path)
    (tmp_path / "config.yaml").write_text(dump(config))

    def show(*arguments: str) -> str:
        command = [PYTHON, "-m", "trainer", "config", str(tmp_path / "config.yaml"), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert show("run.seed=7").startswith(dump(config)[:30])
    assert "seed: 7" in show("run.seed=7")
    assert show("--get", "run.dir") == f"{tmp_path}/run\n"
    assert "error: --get run.dirs: no such value" in show("--get", "run.dirs")
    assert show("--get", "run.dir", "--nodes", "2", "--ranks-per-node", "3") == f"{tmp_path}/run\n"
    assert "error: data.batch_size: 12 does not divide among 5 ranks" in show("--ranks-per-node", "5")
