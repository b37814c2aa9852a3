"""Parts that time the recipe's step: throughput and memory against `plan`, fp16, torch.compile, and a profile."""

import functools
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trainer import distributed
from trainer.bench import throughput
from trainer.bench.gpu.record import Line, Setting, at_most, fast_enough, holds, in_time, skipped
from trainer.bench.gpu.trajectory import difference, make_config
from trainer.bench.harness import seconds, synchronize
from trainer.bench.synthetic import build_step, frozen_rates, random_views
from trainer.config import Config
from trainer.cuda_graph import WARM_UP
from trainer.distributed import RankInfo
from trainer.engines.base import EngineSettings
from trainer.plan.cases import case_config
from trainer.plan.dry_run import DryRun, dry_run
from trainer.plan.hardware import GPUS, Cluster, Gpu, known_gpu
from trainer.plan.predict import step_time
from trainer.plan.trace import OperatorEvent
from trainer.pretrain import rates_at

MEMORY_SHARE = 0.15  # that the planner may be wrong by in either direction
SPEED_SHARE = 0.7  # of the predicted speed is fast enough: the planner's shares of peak rates are fitted to one GPU
BUSY_SHARE = 0.9  # of a step in which the GPU computes
LAUNCHES_SHARE = 1.5  # kernels for each operator that the planner counts
GAPS = 5  # the longest ones are reported


def recipe(setting: Setting, images: int, *changes: dict[str, Any]) -> Config:
    """Return the ResNet-50 recipe of configs/adco_r50_200ep.yaml at so many images a GPU; on a CPU a small ResNet."""
    if setting.small:
        return make_config("resnet", "cpu", *changes, batch_size=images)
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": "none", "epochs": 200, "device": setting.device.type},
        "data": {"train": "none", "batch_size": images, "views": [{"size": 224}] * 2},
        "model": {"backbone": "resnet50", "backbone_args": {"zero_init_last": False}},
        "method": {"bn": "shuffle"},
        "bank": {"init": "random"},
        "optim": {"lr": 0.03},
    }
    for change in changes:
        for name, settings in change.items():
            values[name] = {**values.get(name, {}), **settings}
    return Config.model_validate(values)


def check_throughput(setting: Setting) -> Iterator[Line]:
    """Compare speed, phases and memory with the planner's predictions, at 32 and 256 images a GPU."""
    gpu = known_gpu(setting.device)
    for images in (32, 256) if not setting.small else (8, 16):
        config = recipe(setting, images)
        key = next((key for key, other in GPUS.items() if other is gpu), "a100")
        planned_config = case_config(config, "ddp", config.bank.placement, images, key)
        (planned,) = dry_run([planned_config], 1, 1)
        result = throughput.run(config, ("synthetic",), steps=setting.pick(20, 2), warmup=setting.pick(8, 1))
        figures = result["modes"]["synthetic"]
        yield from _compare(f"{images} images", planned, figures, gpu, images)
        free_memory(setting.device)


def _compare(name: str, planned: DryRun, figures: dict[str, Any], gpu: Gpu | None, images: int) -> Iterator[Line]:
    memory, peak = figures["memory_gib"], planned.memory.peak / 2**30
    details = {"measured": figures, "planned": planned.memory._asdict()}
    if "reserved_gib" in figures:
        off = abs(memory / peak - 1)
        yield at_most(f"{name}, memory", off, MEMORY_SHARE, f"{memory:.2f} GiB, plan {peak:.2f}", details=details)
    else:
        yield skipped(f"{name}, memory", f"a CPU counts the whole process, plan {peak:.2f} GiB", memory, "GiB")
    speed = figures["images_per_second"]
    if gpu is None:
        yield skipped(f"{name}, speed", "no rates of this device to predict with", speed, "images/s")
        return
    step = step_time(planned.events, Cluster(gpu, 1, 1.0), 1, images)
    predicted = images / step.seconds
    note = f"plan {predicted:.0f}, MFU {100 * figures['mfu']:.1f} %" if "mfu" in figures else f"plan {predicted:.0f}"
    yield fast_enough(f"{name}, speed", speed, SPEED_SHARE * predicted, note, "images/s", details)
    for phase in step.phases:
        if measured := figures["phases"].get(phase.phase):
            taken = 1e3 * max(phase.seconds, phase.host)  # where the host is behind, the GPU waits within the phase
            bound = taken / SPEED_SHARE
            yield in_time(f"{name}, {phase.phase}", 1e3 * measured["seconds"], bound, f"plan {taken:.2f}")


def check_fp16_speed(setting: Setting) -> Iterator[Line]:
    """Compare fp16's speed with bf16's: their BatchNorm is not the same code (cuDNN's and torch's own)."""
    images = setting.pick(256, 8)
    with distributed.process_group(setting.device.type) as rank_info:
        taken = {}
        for precision in ("bf16", "fp16"):
            config = recipe(setting, images, {"run": {"precision": precision}})
            _, taken[precision], _ = _train(config, rank_info, setting)
            free_memory(setting.device)
    note = "bf16's, and a fifth more"
    yield in_time(f"{images} images, fp16", 1e3 * taken["fp16"], 1.2e3 * taken["bf16"], note)


def check_compile(setting: Setting) -> Iterator[Line]:
    """Compare losses and speed of each engine.compile with those of none, and a CUDA graph's with eager ones."""
    if setting.small:  # everything except the compiler, which would take a CPU minutes
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    images = setting.pick(32, 8)
    with distributed.process_group(setting.device.type) as rank_info:

        def train(**engine: Any) -> tuple[list[float], float, bool]:
            free_memory(setting.device)
            return _train(recipe(setting, images, {"engine": engine}), rank_info, setting)

        first: tuple[list[float], float] | None = None
        for value in get_args(EngineSettings.model_fields["compile"].annotation):
            name = f"compile {value}"
            losses, taken, _ = train(compile=value)
            if first is None:
                first = losses, taken
                note, details = "the others are compared with it", {"losses": losses}
                yield Line(f"{name}, step of {images}", "skipped", 1e3 * taken, unit="ms", note=note, details=details)
            else:
                # Compiled code rounds to bf16 at other places.
                off = difference(losses[:3], first[0][:3])
                yield at_most(f"{name}, losses", off, 5e-2, "of compile none", details={"losses": losses})
                yield in_time(f"{name}, step of {images}", 1e3 * taken, 1e3 * first[1], "compile none")
            if setting.small:
                yield skipped(f"{name}, graph", "not on a CPU")
                continue
            replayed, taken, captured = train(compile=value, cuda_graph=True)
            yield holds(f"{name}, graph, captured", captured, "otherwise the log above says why")
            off = difference(replayed, losses)
            note = f"of {name}, steps {WARM_UP + 1} to {len(losses)} as replays"
            yield at_most(f"{name}, graph, losses", off, 1e-2, note, details={"losses": replayed})
            yield in_time(f"{name}, graph, step of {images}", 1e3 * taken, 1e3 * first[1], "compile none")


def _train(config: Config, rank_info: RankInfo, setting: Setting) -> tuple[list[float], float, bool]:
    """Return the losses of the first steps, the seconds of a later one, and whether it replays a CUDA graph.

    The host launches the timed steps without waiting for the device, as in training.
    """
    train_step = build_step(config, rank_info)
    views, rates = random_views(config, rank_info), rates_at(config, 0, 100)

    def take(steps: int) -> list[Tensor]:
        return [train_step.step(views, step, rates).metrics["loss"].detach() for step in range(steps)]

    losses = torch.stack(take(setting.pick(WARM_UP + 4, 3))).tolist()
    rates = frozen_rates(config)
    take(setting.pick(3, 1))
    steps = setting.pick(20, 2)
    taken = seconds(lambda: take(steps), rank_info.device) / steps
    return losses, taken, train_step.graph is not None and train_step.graph.replay is not None


def check_profile(setting: Setting) -> Iterator[Line]:
    """Find when the GPU waits for the host at 32 images, and count kernels against the planner's operators.

    Writes trace.json.gz, for ui.perfetto.dev.
    """
    images, steps = setting.pick(32, 8), 3
    config = recipe(setting, images)
    planned = dry_run([case_config(config, "ddp", config.bank.placement, images, "a100")], 1, 1)[0]
    with distributed.process_group(setting.device.type) as rank_info:
        train_step = build_step(config, rank_info)
        views, rates = random_views(config, rank_info), frozen_rates(config)
        for step in range(setting.pick(10, 1)):
            train_step.step(views, step, rates)
        synchronize(setting.device)
        on_gpu = setting.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            for step in range(steps):
                train_step.step(views, step, rates)
            synchronize(setting.device)
    profiler.export_chrome_trace(str(setting.folder / "trace.json.gz"))
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    phases = set(train_step.phases.pop())  # they are recorded on the GPU, too, and cover its gaps
    events = [e for e in profiler.events() or [] if e.device_type == wanted and e.name not in phases]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
    if not spans:
        yield skipped(
            f"{images} images", "the profiler sees no kernels: this user may not read the GPU's counters (CUPTI)"
        )
        return
    gaps = find_gaps(spans)
    length = max(end for _, end, _ in spans) - spans[0][0]
    idle = sum(gap for gap, _ in gaps)
    longest = ", ".join(f"{gap:.0f} us before {name[:40]}" for gap, name in sorted(gaps, reverse=True)[:GAPS])
    busiest = Counter[str]()
    for start, end, name in spans:
        busiest[name] += end - start
    details = {"microseconds by kernel": dict(busiest.most_common(20))}
    yield fast_enough(f"{images} images, busy", 100 * (1 - idle / length), 100 * BUSY_SHARE, longest, "%", details)
    operators = sum(isinstance(event, OperatorEvent) for event in planned.events)
    # A foreach operator over many tensors takes several kernels, and so does a convolution that converts its layout.
    bound, note = LAUNCHES_SHARE * operators, f"plan counts {operators} operators"
    yield in_time(f"{images} images, kernels", len(spans) / steps, bound, note, "a step")


def find_gaps(spans: list[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """Return the gaps that no span covers: each one's length, and the name of the span that ends it.

    Args:
        spans: Start, end and name, sorted by start.
    """
    gaps, covered = [], spans[0][1]
    for start, end, name in spans:
        if start > covered:
            gaps.append((start - covered, name))
        covered = max(covered, end)
    return gaps


def free_memory(device: torch.device) -> None:
    """Return freed memory to the GPU, and begin a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
