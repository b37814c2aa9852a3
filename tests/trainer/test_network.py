"""A run on two network namespaces survives a short failure of their link, and ends clearly after a permanent one."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.trainer.small import PYTHON, small_config, write_images
from tests.trainer.test_kills import start
from trainer.config_file import dump
from trainer.run.results import read_rows

NAMES = [f"adco{os.getpid()}{side}" for side in "ab"]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
STEP_TIMEOUT, LONG_TIMEOUT = 20, 40


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def cable() -> Iterator[Callable[[bool], None]]:
    """Create two linked namespaces; yields a function that takes the link down (False) or up (True)."""
    if shutil.which("ip") is None:
        pytest.skip("no ip: apt-get install iproute2")
    a, b = NAMES
    pair = ("link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b)
    try:
        if not (ip("netns", "add", a) and ip("netns", "add", b) and ip(*pair)):
            pytest.skip("network namespaces are not permitted here: needs root")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("-n", name, "link", "set", "wire", "up")
        yield lambda joined: assert_ip("-n", b, "link", "set", "wire", "up" if joined else "down")
    finally:
        ip("netns", "del", a)
        ip("netns", "del", b)


def assert_ip(*arguments: str) -> None:
    assert ip(*arguments)


def run_ranks(config: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """Start one rank in each namespace."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
    environment |= {"GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank, name in enumerate(NAMES):
        command = ["ip", "netns", "exec", name, PYTHON, "-m", "trainer", "pretrain", str(config)]
        with log.with_suffix(f".{rank}").open("wb") as file:
            ranks.append(subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=file, stderr=file))
    return ranks


def until(step: int, run: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while newest(run) < step:
        assert time.monotonic() < end, f"step {step}: not within {seconds} s"
        time.sleep(0.05)


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


@pytest.mark.slow
def test_a_cut_is_survived_or_ends_clearly(tmp_path: Path, cable: Callable[[bool], None]) -> None:
    images = write_images(tmp_path / "images")
    run, whole = tmp_path / "cut", tmp_path / "whole"
    configs = [
        small_config(
            folder,
            images,
            run={"dir": str(folder), "epochs": 20, "device": "cpu", "log_every": 5, "save_every": 10, "keep": 2}
            | {"step_timeout": STEP_TIMEOUT, "long_timeout": LONG_TIMEOUT},
            data={"val": None},
            eval={"knn_every": 0},
        )
        for folder in (run, whole)
    ]
    file, log = tmp_path / "config.yaml", tmp_path / "log"
    file.write_text(dump(configs[0]))
    ranks = run_ranks(file, log)
    try:
        until(10, run)
        cable(False)
        time.sleep(4)
        step = newest(run)
        time.sleep(1)
        assert newest(run) == step, "training must wait for the network"
        cable(True)
        until(step + 20, run)  # training continues
        cable(False)
        cut = time.monotonic()
        assert [rank.wait(300) for rank in ranks] == [70, 70]  # the exit code of the watchdog
        assert time.monotonic() - cut < LONG_TIMEOUT + 30
    finally:
        for process in ranks:
            process.kill()
    for rank in range(2):
        text = log.with_suffix(f".{rank}").read_text()
        assert re.search(rf"error: rank {rank}: .*step \d+ has not ended after [24]0 s: stacks in", text), text
    step = newest(run)
    cable(True)
    ranks = run_ranks(file, log)
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    assert f"continuing from {run}/checkpoints/step-{step:08d}" in log.with_suffix(".0").read_text()
    for undisturbed in start(configs[1], 2):
        undisturbed.join()
    losses = [[row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row] for folder in (run, whole)]
    assert losses[0] == losses[1]
    manifests = [json.loads((f / "checkpoints/step-00000120/manifest.json").read_text()) for f in (run, whole)]
    assert manifests[0]["weights.safetensors"] == manifests[1]["weights.safetensors"]
