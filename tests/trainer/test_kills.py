"""Runs that are killed at random moments, also while saving, resume and end bit-identical to undisturbed ones."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_watch import descendants
from tests.trainer.small import RESNET, small_config, write_images
from trainer.config import Config
from trainer.config_file import dump
from trainer.ops.stop import StopHandler
from trainer.pretrain import pretrain
from trainer.run.results import read_rows

TIMINGS = {"seconds", "images_per_second", "data_wait", "memory_gib", "teraflops", "phases"}
PREDICTOR = {"predictor": 16, "head_norm": True}
MODELS = {"acssl": PREDICTOR, "byol": PREDICTOR}
SETTINGS: dict[str, dict[str, Any]] = {"acssl": {"negatives_from": "queue", "hardest": 4}, "simclr": {"bn": "local"}}


def start(config: Config, ranks: int) -> list[BaseProcess]:
    """Start the processes of one attempt. A fork server imports torch once, so that an attempt takes a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[BaseProcess] = [
        context.Process(target=rank_of, args=(config, r, ranks, port)) for r in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def rank_of(config: Config, rank: int, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # ranks share the cores
    should_stop = StopHandler.should_stop

    def slow(handler: StopHandler) -> bool:
        time.sleep(
            0.02
        )  # so that the test, which may have to wait for a core, can kill a run several times in its steps
        return should_stop(handler)

    StopHandler.should_stop = slow  # type: ignore[assignment,method-assign]
    pretrain(config)


def writing(folder: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob(".step-*"))


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the metrics without timings, and the SHA-256 of all tensors of the last checkpoint."""
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder / "metrics.jsonl")]
    manifest = json.loads((folder / "checkpoints/step-00000054/manifest.json").read_text())
    tensors = {name: entry["sha256"] for name, entry in manifest.items() if name.endswith((".distcp", ".safetensors"))}
    assert tensors
    return rows, tensors


@pytest.mark.parametrize(
    ("engine", "ranks", "times", "method"),
    [
        pytest.param("ddp", 1, 6, "adco", marks=pytest.mark.slow),
        pytest.param("fsdp", 2, 8, "adco", marks=pytest.mark.slow),
        pytest.param("fsdp", 2, 4, "moco", marks=pytest.mark.slow),
        pytest.param("ddp", 1, 4, "acssl", marks=pytest.mark.slow),
        pytest.param("ddp", 1, 4, "byol", marks=pytest.mark.slow),
        pytest.param("ddp", 1, 4, "simclr", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment(tmp_path: Path, engine: str, ranks: int, times: int, method: str) -> None:
    images = write_images(tmp_path / "images")
    configs = [
        small_config(
            tmp_path / name,
            images,
            run={
                "dir": str(tmp_path / name),
                "epochs": 9,
                "device": "cpu",
                "log_every": 1,
                "save_every": 2,
                "keep": 2,
            },
            model={**RESNET, **MODELS.get(method, {})},
            engine={"kind": engine},
            method={
                "name": method,
                "teacher_momentum": 0.9,
                "teacher_momentum_final": 1,
                **SETTINGS.get(method, {}),
            },
            eval={"knn_every": 0, "k": 5},
        )
        for name in ("whole", "killed")
    ]
    for process in start(configs[0], ranks):
        process.join()
        assert process.exitcode == 0
    chance = random.Random(0)
    log = tmp_path / "killed/metrics.jsonl"
    kills = saving = 0
    while not (tmp_path / "killed/results.json").exists():
        processes = start(configs[1], ranks)
        rows = log.read_text().count("\n") if log.exists() else 0
        go_on = rows + chance.randint(1, 3) if kills < times else 1000
        while all(p.is_alive() for p in processes):
            done = log.read_text().count("\n") if log.exists() else 0
            if done >= go_on:
                time.sleep(chance.uniform(0, 0.03))  # a random moment in a step, in a save or in between
                patience = time.monotonic() + (2 if kills % 2 else 0)  # every second kill waits for a save
                while not (hit := writing(tmp_path / "killed")) and time.monotonic() < patience:
                    time.sleep(0.0002)  # leaves the core to the ranks
                saving += hit
                for process in processes:
                    if process.pid:
                        os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        for process in processes:
            process.join()
    assert kills >= times
    assert saving >= times // 4, "the checkpoints are to be hit, too"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_and_workers_end_with_a_killed_torchrun(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    run, data = {"epochs": 100_000, "save_every": 1_000_000, "log_every": 1}, {"workers": 1}
    config = small_config(tmp_path / "run", images, run=run, data=data, eval={"knn_every": 0})
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "trainer"]
    torchrun = subprocess.Popen([*command, "pretrain", str(tmp_path / "config.yaml")], stderr=subprocess.DEVNULL)
    rows = tmp_path / "run/metrics.jsonl"
    for _ in range(2400):
        if rows.exists() and rows.read_text().count("loss") > 1:
            break
        time.sleep(0.1)
    processes = descendants(torchrun.pid)
    assert len(processes) >= 3, "a rank, its fork server and a worker"
    torchrun.kill()
    torchrun.wait()
    for _ in range(2400):
        if not any(Path(f"/proc/{process}").exists() for process in processes):
            break
        time.sleep(0.1)
    assert [process for process in processes if Path(f"/proc/{process}").exists()] == []
    assert (tmp_path / "run/stopped.json").exists(), "the rank has saved a checkpoint"
