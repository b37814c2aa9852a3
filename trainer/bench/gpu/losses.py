"""Parts that train: losses against the CPU's, fp16, host reads, every method and engine on one device."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.extras import is_installed
from trainer import distributed
from trainer.bench.gpu.record import Line, Setting, at_most, holds, skipped
from trainer.bench.gpu.trajectory import METHODS, difference, make_config, make_views, mean_difference, train
from trainer.bench.synthetic import build_step
from trainer.distributed import RankInfo
from trainer.pretrain import rates_at

FIRST = 5  # steps that are compared closely: later ones amplify rounding errors, see the nudged trajectory
NUDGE = 1e-6  # share of the weights; fp32 rounds to 6e-8, and a network of 20 layers adds up to about that
ROOM = 4.0  # times the difference that rounding errors alone make
_ROOT = Path(__file__).parents[3]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero3": {"kind": "deepspeed", "stage": 3},
}


def check_losses(setting: Setting) -> Iterator[Line]:
    """Compare the losses of 200 steps with the CPU's in fp32 and then in bf16, with BatchNorm and without.

    The yardstick in fp32 is how far the CPU's own losses move when the initial weights change by 1e-6; in bf16 it is
    how far the CPU's bf16 losses are from its fp32 losses.
    """
    exact_convolutions()
    steps = setting.pick(200, 6)
    with distributed.process_group(setting.device.type) as rank_info:
        cpu = rank_info._replace(device=torch.device("cpu"))
        expected, nudged = {}, {}
        for network in ("resnet", "vit"):
            config = make_config(network, "cpu")
            expected[network] = train(config, cpu, steps)
            nudged[network] = train(config, cpu, steps, NUDGE)
            found = train(make_config(network, setting.device.type), rank_info, steps)
            yield from _compare(f"{network} fp32", found, expected[network], nudged[network], floor=1e-4)
        for network in ("resnet", "vit"):
            bf16 = {"run": {"precision": "bf16"}}
            yardstick = train(make_config(network, "cpu", bf16), cpu, steps)
            found = train(make_config(network, setting.device.type, bf16), rank_info, steps)
            yield from _compare(f"{network} bf16", found, expected[network], yardstick, floor=1e-2)


def exact_convolutions() -> None:
    """Let this process convolve fp32 in fp32: with TF32, cuDNN's default, inputs have 10 bits."""
    torch.backends.cudnn.allow_tf32 = False


def _compare(
    name: str, found: list[float], expected: list[float], yardstick: list[float], floor: float
) -> Iterator[Line]:
    for steps, where, distance in (
        (min(FIRST, len(found)), "first", difference),
        (len(found), "mean of all", mean_difference),
    ):
        room = distance(yardstick[:steps], expected[:steps])
        bound = max(floor if where == "first" else 100 * floor, ROOM * room)
        note = f"of the CPU's fp32 losses; rounding alone makes {room:.1e}"
        details = {"losses": found, "cpu": expected}
        value = distance(found[:steps], expected[:steps])
        yield at_most(f"{name}, {where} {steps} steps", value, min(bound, 0.1), note, details=details)


def check_fp16(setting: Setting) -> Iterator[Line]:
    """Compare fp16's first loss with fp32's; later ones must be finite, and the loss scale must skip few steps."""
    steps = setting.pick(60, 4)
    with distributed.process_group(setting.device.type) as rank_info:
        for network in ("resnet", "vit"):
            exact = train(make_config(network, setting.device.type), rank_info, 1)
            half = make_config(network, setting.device.type, {"run": {"precision": "fp16"}})
            train_step = build_step(half, rank_info)
            found = []
            for step in range(steps):
                metrics = train_step.step(make_views(half, rank_info, step), step, rates_at(half, 0, steps)).metrics
                found.append(torch.stack([metrics["loss"].float(), metrics["skipped"].float()]))
            losses, skips = torch.stack(found).unbind(1)
            # Skipped steps let later losses differ, but not the first one.
            yield at_most(f"{network}, first loss", difference(losses[:1].tolist(), exact), 1e-2, "of fp32's")
            yield holds(f"{network}, losses", bool(losses.isfinite().all()), f"{steps} losses are finite")
            # From 65536 the scale halves with each overflow; more than 12 would leave fewer than 16.
            yield at_most(f"{network}, skipped steps", float(skips.sum()), 12, f"of {steps}; the scale begins at 65536")


def check_host_reads(setting: Setting) -> Iterator[Line]:
    """Take a step of every method in which a read by the host is an error."""
    with distributed.process_group(setting.device.type) as rank_info:
        for method, changes in METHODS.items():
            yield _step_without_reads(f"{method}, ddp", rank_info, changes)
        yield _step_without_reads("adco, ddp, fp16", rank_info, {"run": {"precision": "fp16"}})
        yield _step_without_reads("adco, fsdp", rank_info, {"engine": ENGINES["fsdp"]})


def _step_without_reads(name: str, rank_info: RankInfo, changes: dict[str, Any]) -> Line:
    config = make_config("resnet", rank_info.device.type, changes)
    train_step = build_step(config, rank_info)
    views, rates = make_views(config, rank_info, 0), rates_at(config, 0, 4)
    for step in range(2):  # allocates, compiles and searches algorithms
        train_step.step(views, step, rates)
    try:
        with _forbid_host_reads(rank_info.device):
            train_step.step(views, 2, rates)
    except RuntimeError as error:  # what the debug mode raises; anything else ends the part
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(_ROOT))]
        where = " <- ".join(f"{Path(f.filename).relative_to(_ROOT)}:{f.lineno}" for f in frames[:-4:-1])
        return holds(name, False, f"{str(error).splitlines()[0]} at {where}")
    if rank_info.device.type != "cuda":
        return skipped(name, "a CPU has nothing to wait for, so reads cannot be seen")
    return holds(name, True, "no read in the third step")


@contextmanager
def _forbid_host_reads(device: torch.device) -> Iterator[None]:
    """Make each operation that waits for the GPU raise RuntimeError; a CPU has nothing to wait for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_methods(setting: Setting) -> Iterator[Line]:
    """Train every method under DDP, and AdCo and BYOL under the other engines, and compare with DDP on the CPU."""
    exact_convolutions()
    steps = setting.pick(FIRST, 2)
    with distributed.process_group(setting.device.type) as rank_info:
        cpu = rank_info._replace(device=torch.device("cpu"))
        for method, changes in METHODS.items():
            expected = train(make_config("resnet", "cpu", changes), cpu, steps)
            engines = ENGINES if method == "adco" or (method == "byol" and not setting.small) else ("ddp", "fsdp")
            for engine in engines:
                name = f"{method}, {engine}"
                if ENGINES[engine]["kind"] == "deepspeed" and not is_installed("deepspeed"):
                    yield skipped(name, "DeepSpeed is not installed (requirements/deepspeed.txt)")
                    continue
                config = make_config("resnet", setting.device.type, changes, {"engine": ENGINES[engine]})
                found = train(config, rank_info, steps)
                note = "of the losses of DDP on the CPU, fp32"
                yield at_most(name, difference(found, expected), 1e-2, note, details={"losses": found, "cpu": expected})
