"""Parts for two and more GPUs: several ranks train as one does, and a job ends when a rank is killed."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data.extras import is_installed
from trainer import distributed
from trainer.bench.gpu.losses import ENGINES, exact_convolutions
from trainer.bench.gpu.record import Line, Setting, at_most, holds, skipped
from trainer.bench.gpu.runs import write_images
from trainer.bench.gpu.trajectory import difference, make_config, take_steps, train
from trainer.bench.synthetic import build_step
from trainer.config import Config
from trainer.config_file import dump
from trainer.run import checkpoint

# What must not depend on the number of ranks. The ViT has no BatchNorm, so its teacher's keys are the same after the
# images were shuffled, if they come back to their own queries.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adco, synchronised BatchNorm": ("resnet", {}),
    "simclr, synchronised BatchNorm": ("resnet", {"method": {"name": "simclr", "bn": "sync"}}),
    "adco, shuffled images": ("vit", {"method": {"bn": "shuffle"}}),
}
KILL_SECONDS = 60.0  # in which all ranks end when one was killed: torchrun waits 30 for those that do not


def _count(setting: Setting) -> int:
    """Return the number of ranks: the largest power of two that there are GPUs for."""
    return 2 if setting.small else 1 << (torch.cuda.device_count().bit_length() - 1)


def check_ranks(setting: Setting) -> Iterator[Line]:
    """Compare the losses of all GPUs together with those of one, and the ranks' statistics, for every engine."""
    ranks, steps = _count(setting), setting.pick(5, 2)
    if ranks < 2:
        yield skipped("all engines", "this machine has one GPU, needs two or more")
        return
    device = setting.device.type
    alone = {name: make_config(network, device, changes) for name, (network, changes) in CASES.items()}
    (expected,) = run_ranks(1, _train_all, alone, device, steps)
    for kind in dict.fromkeys(settings["kind"] for settings in ENGINES.values()):
        if kind == "deepspeed" and not is_installed("deepspeed"):
            yield skipped(kind, "DeepSpeed is not installed (requirements/deepspeed.txt)")
            continue
        cases = {
            (engine, name): make_config(network, device, changes, {"engine": settings})
            for engine, settings in ENGINES.items()
            for name, (network, changes) in CASES.items()
            if settings["kind"] == kind
        }
        by_rank = run_ranks(ranks, _train_all, cases, device, steps)
        for engine, name in cases:
            mean = [sum(losses) / ranks for losses in zip(*(found[engine, name] for found in by_rank), strict=True)]
            # The ResNet amplifies the rounding of other sums, see the part `losses`.
            bound = 1e-2 if CASES[name][0] == "resnet" else 1e-4
            details = {"losses": mean, "one rank": expected[name]}
            note = f"{ranks} ranks, of one's"
            yield at_most(f"{engine}, {name}", difference(mean, expected[name]), bound, note, details=details)
        local = {
            engine: make_config("resnet", device, {"method": {"bn": "local"}, "engine": settings})
            for engine, settings in ENGINES.items()
            if settings["kind"] == kind
        }
        by_rank = run_ranks(ranks, _running_statistics, local, device, steps)
        for engine in local:
            first, *others = (found[engine] for found in by_rank)
            equal = all(other == first for other in others)
            yield holds(f"{engine}, running statistics", equal, f"the same bits on {ranks} ranks, bn: local")


def _train_all(configs: dict[Any, Config], device: str, steps: int) -> dict[Any, list[float]]:
    exact_convolutions()
    with distributed.process_group(device) as rank_info:
        return {name: train(config, rank_info, steps) for name, config in configs.items()}


def _running_statistics(configs: dict[str, Config], device: str, steps: int) -> dict[str, list[float]]:
    """Train with each configuration and return the means and variances of the student's BatchNorms as one list."""
    found = {}
    with distributed.process_group(device) as rank_info:
        for name, config in configs.items():
            train_step = build_step(config, rank_info)
            take_steps(train_step, config, rank_info, steps)
            buffers = train_step.method.student.named_buffers()
            found[name] = torch.cat([b.flatten() for key, b in buffers if "running" in key]).tolist()
    return found


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what a function returns on each of several ranks of this machine, or raise what one raised.

    The ranks are forked, which is safe as this process has not used a device yet, so that they end with it when it is
    killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ProcessPoolExecutor(world_size, multiprocessing.get_context("fork")) as pool:
        # Each task waits for all others to join the group, so no process takes two of them.
        tasks = [pool.submit(_rank, rank, world_size, port, function, args) for rank in range(world_size)]
        return [task.result() for task in tasks]


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    return function(*args)


def check_killed_rank(setting: Setting) -> Iterator[Line]:
    """Kill a rank of torchrun: the others must end, with a non-zero exit code and an intact checkpoint."""
    ranks = _count(setting)
    if ranks < 2:
        yield skipped("a killed rank", "this machine has one GPU, needs two or more")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", 64, side=40)
        run = {"dir": str(folder / "run"), "epochs": 10_000, "log_every": 1, "save_every": 2}
        data = {"train": str(images), "backend": "cpu"}  # DALI need not be installed
        config = make_config("resnet", setting.device.type, {"run": run, "data": data})
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        torchrun = subprocess.Popen([*launcher, "-m", "trainer", "pretrain", str(folder / "config.yaml")])
        checkpoints = folder / "run/checkpoints"
        while torchrun.poll() is None and not list(checkpoints.glob("step-*/.metadata")):
            time.sleep(0.1)
        if torchrun.poll() is not None:
            yield holds("training", False, f"exit code {torchrun.returncode} before a rank was killed")
            return
        os.kill(_children(torchrun.pid)[-1], signal.SIGKILL)
        began = time.monotonic()
        torchrun.wait()
        yield at_most("the others end", time.monotonic() - began, KILL_SECONDS, f"of {ranks} ranks", "s")
        yield holds("exit code", torchrun.returncode != 0, str(torchrun.returncode))
        with distributed.process_group("cpu"):
            saved = checkpoint.newest(checkpoints)
        yield holds("checkpoint", saved is not None, f"{saved.name if saved else 'none'} is intact")


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started, in the order of their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)
