"""The preflight: which faults it finds, and which node it names."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.trainer.small import PYTHON, small_config, write_images
from trainer.config_file import dump
from trainer.distributed import RankInfo
from trainer.ops.node_checks import find_problems, node_address
from trainer.ops.preflight import (
    AllReduceSpeed,
    Fault,
    NodeExchange,
    NodeReport,
    Peer,
    _choose_peers,
    _connect,
    _measure_speeds,
    find_faults,
)

ROOT = Path(__file__).parents[2]


def node(name: str, **changes: Any) -> NodeReport:
    versions, speeds = {"Python": "3.11.7", "package timm": "1.0.31"}, {"matmul TFLOP/s": 200.0}
    connections = {peer: True for peer in ("n1", "n2", "n3") if peer != name}
    return NodeReport(name, versions, [], 0.0, 100.0, connections, speeds)._replace(**changes)


def nodes(**changes: Any) -> list[NodeReport]:
    """Return reports of n1, n2 and n3, where n2 has these changes."""
    return [node("n1"), node("n2", **changes), node("n3")]


def test_nodes_that_are_alike() -> None:
    assert find_faults(nodes()) == []
    assert find_faults(nodes(clock=3.0, memory=50.0, speeds={"matmul TFLOP/s": 90.0})) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"problems": ["data.train: /data does not exist"]}, "data.train: /data does not exist"),
        (
            {"versions": {"Python": "3.11.2"}},
            "Python 3.11.2, but 3.11.7 on 2 of 3 nodes; package timm absent, but 1.0.31 on 2 of 3 nodes",
        ),
        ({"clock": -65.0}, "its clock differs from the others by -65.0 s"),
        ({"connections": {"n1": False, "n3": False}}, "n2 cannot connect to 2 nodes"),
        ({"speeds": {"matmul TFLOP/s": 60.0}}, "matmul TFLOP/s: 60, the median of the nodes is 200"),
    ],
)
def test_the_one_that_is_not_is_named(changes: dict[str, Any], text: str) -> None:
    assert find_faults(nodes(**changes)) == [Fault("n2", text)]


def test_one_that_nobody_reaches_is_blamed_and_not_the_others() -> None:
    first = node("n1", connections={"n2": False, "n3": True})
    faults = find_faults([first, node("n2"), node("n3", connections={"n1": True, "n2": False})])
    assert {fault.node for fault in faults} == {"n2", None}
    assert any(fault.text.startswith("2 nodes cannot connect to it; GLOO_SOCKET_IFNAME") for fault in faults)


def test_two_that_differ_are_both_shown_and_none_is_blamed() -> None:
    (fault,) = find_faults([node("n1"), node("n2", versions={"Python": "3.11.7", "package timm": "0.1"})])
    assert fault == Fault(None, "package timm 1.0.31 on n1, 0.1 on n2")


def test_many_differences_take_one_line() -> None:
    versions = {f"package p{i}": "1" for i in range(40)}
    (fault,) = find_faults([node("n1", versions=versions), node("n2", versions={}), node("n3", versions=versions)])
    assert fault.text.endswith("; and 35 more")


def test_a_node_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.ops.preflight._TIMEOUT", 0.4)
    exchange = NodeExchange(dist.HashStore(), 0, 2, True)
    exchange.names = ["n1", "n2"]
    with pytest.raises(ValueError, match=r"1 of 2 nodes have not sent their facts within 0\.2 s: n2"):
        exchange.gather("facts", lambda: 1)


def test_nodes_that_cannot_be_reached() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as there, closing(socket.create_server(("", 0))) as gone:
        closed = gone.getsockname()[1]
        gone.close()
        peers = [Peer("n1", "127.0.0.1", there.getsockname()[1]), Peer("n2", "127.0.0.1", closed)]
        assert _connect(peers) == {"n1": True, "n2": False}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 1000])
def test_connections_grow_linearly_with_the_nodes(count: int) -> None:
    """Each node tests the next one of a ring and a few others, so that every node is tested."""
    everyone = [Peer(f"n{i}", "", i) for i in range(count)]
    for i in range(count):
        chosen = _choose_peers(i, everyone)
        assert len(set(chosen)) == len(chosen) == min(4, count - 1)
        assert everyone[i] not in chosen
        assert count == 1 or everyone[(i + 1) % count] in chosen


def test_the_node_without_a_network_is_found_among_many() -> None:
    """n7 reaches nobody and nobody reaches it; the few others that tried are not at fault."""
    everyone = [Peer(f"n{i}", "", i) for i in range(200)]
    reports = []
    for i, peer in enumerate(everyone):
        tests = {chosen.name: 7 not in (i, everyone.index(chosen)) for chosen in _choose_peers(i, everyone)}
        reports.append(node(peer.name, connections=tests))
    assert {fault.node for fault in find_faults(reports)} == {"n7", None}


def test_the_address_of_the_interface_that_gloo_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    assert node_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none7")
    assert node_address() == ""


def measure(ranks_per_node: int) -> tuple[list[dict[str, float]], AllReduceSpeed]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rank_info = RankInfo(torch.device("cpu"), rank, world_size, ranks_per_node)
    return _measure_speeds(rank_info, rank // ranks_per_node, world_size // ranks_per_node)


@pytest.mark.parametrize(("ranks_per_node", "link"), [(1, "with a neighbour"), (2, "in the node")])
def test_speeds_of_every_node(ranks_per_node: int, link: str) -> None:
    """Each rank creates only the groups that it belongs to; all ranks get the speeds of all nodes."""
    first, *others = run_ranks(4, measure, ranks_per_node)
    assert [other[0] for other in others] == [first[0]] * 3
    speeds, total = first
    assert len(speeds) == 4 // ranks_per_node
    for node_speeds in speeds:
        assert node_speeds.keys() == {"matmul TFLOP/s", f"all-reduce {link} GB/s"}
        assert min(node_speeds.values()) > 0
    assert total.gb_per_second > 0
    assert total.mib == 4


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, str]:
    """Return an environment with an `ssh` that runs every command on this machine and hangs it up when it ends."""
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


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="slurm/env.sh names .venv, which is not here")
def test_two_hosts_over_ssh(tmp_path: Path, hosts: dict[str, str]) -> None:
    def start(*settings: str) -> subprocess.CompletedProcess[str]:
        command = ["slurm/ssh.sh", str(tmp_path / "hosts"), str(tmp_path / "config.yaml"), *settings]
        return subprocess.run(command, cwd=ROOT, env=hosts, capture_output=True, text=True, timeout=300)

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
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert find_problems(auto) == []
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert find_problems(auto) == ["sees 0 GPUs for 2 ranks"]
    assert find_problems(cpu) == []


@pytest.mark.slow
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
    assert "error: --get run.dirs: unknown key" in show("--get", "run.dirs")
    assert show("--get", "run.dir", "--nodes", "2", "--ranks-per-node", "3") == f"{tmp_path}/run\n"
    assert "error: data.batch_size: 12 does not divide among 5 ranks" in show("--ranks-per-node", "5")
