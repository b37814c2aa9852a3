"""Pre-training: from a configuration to a finished run directory."""

import copy
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loader import train_batches
from data.order import steps_per_epoch
from data.random import NETWORK, hash_counters
from data.sources.open import Source
from models.collapse import collapse
from models.method import Method
from trainer import distributed
from trainer.build import (
    autocast_dtype,
    build_engine,
    build_method,
    fill_bank,
    full_student,
)
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.optim import cosine, scaled_lr
from trainer.evaluate import knn
from trainer.interop.weights import load_encoder
from trainer.ops import replay
from trainer.ops.stop import StopHandler, deadline
from trainer.ops.watchdog import Watchdog
from trainer.plan.flops import peak, step_flops
from trainer.run import checkpoint
from trainer.run.directory import claim
from trainer.run.files import write_json
from trainer.run.metrics import Averages, MetricsLogger, peak_memory, set_up_logging
from trainer.run.phases import PhaseTimes, find_straggler, gather_phase_times, host_names, phase_metrics, trace_steps
from trainer.run.results import Row, read_rows
from trainer.run.sources import check_batch, open_sources
from trainer.run.unreadable import UnreadableImages
from trainer.train_step import NotFinite, Rates, TrainStep

log = logging.getLogger(__name__)


def pretrain(config: Config) -> None:
    """Train to the end from the newest good checkpoint in the run directory, or from the start, and evaluate.

    Raises ValueError for what the user can mend: the data, the run directory, sizes that do not fit; and, on all
    ranks, where the loss is not finite. Raises `trainer.ops.stop.Stopped` where it was asked to end early.
    """
    started = time.time()
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        with claim(config, rank_info) as folder:
            if (folder / "results.json").exists():
                log.info("%s is finished: nothing to do", folder)
            else:
                _pretrain(config, rank_info, folder, started)


def _pretrain(config: Config, rank_info: RankInfo, folder: Path, started: float) -> None:
    train, val = open_sources(config.data, folder)
    check_batch(config, train)
    epoch_steps = steps_per_epoch(len(train), config.data.batch_size)
    steps = epoch_steps * config.run.epochs
    saved = checkpoint.newest(folder / "checkpoints")
    first = config.model.weights  # read once: later the checkpoints have what became of them
    begin = load_encoder(Path(first), config)[0] if first and not saved else None
    method = build_method(config, rank_info, copy.deepcopy(begin))
    parameters = sum(p.numel() for p in method.student.parameters())
    engine = build_engine(method, config, rank_info)
    train_step = TrainStep(method, engine, rank_info, config.optim.accumulate, autocast_dtype(config, rank_info.device))
    start = 0
    if saved:
        start = train_step.load(saved)
    else:
        fill_bank(method.bank, config, rank_info, train, begin)
    _introduce(config, rank_info, method, parameters, train, epoch_steps, saved)

    run, keep_steps = config.run, (config.run.keep_every or 0) * epoch_steps

    def stays(step: int) -> bool:
        return keep_steps > 0 and step % keep_steps == 0

    saver = checkpoint.Saver(folder / "checkpoints", run.keep, stays)
    with (
        MetricsLogger(folder, start, steps, config.monitor, active=rank_info.rank == 0) as metrics_logger,
        StopHandler(folder, deadline(config.run.max_minutes, started)) as stop,
        Watchdog(folder, rank_info.rank) as watchdog,
    ):
        for step in _steps(config, rank_info, train_step, train, start, steps, metrics_logger, watchdog):
            epoch = step / epoch_steps
            stopping = step > start and stop.should_stop()
            watchdog.expect(f"what follows step {step}", config.run.long_timeout)
            if step > start and (step % run.save_every == 0 or step == steps or stays(step) or stopping):
                with train_step.phases("save"):
                    method.average_buffers()
                    saver.start(step, train_step.state(step))
            if stopping and step < steps:
                saver.wait()
                stop.raise_stopped(step)
            every = config.eval.knn_every
            due = step in (0, steps) or (every and epoch % every == 0)
            if val and due and step not in metrics_logger.evaluated_steps:
                method.average_buffers()
                metrics_logger.print(f"epoch {epoch:g}: evaluating")
                student = full_student(method, engine, config, rank_info)
                accuracy = knn.evaluate(student, train, val, rank_info.device, config)
                metrics_logger.log(
                    {"step": step, "epoch": epoch, "images": step * config.data.batch_size, "knn": accuracy}
                )
        saver.wait()
        if rank_info.rank == 0:
            write_json(folder / "results.json", _results(config, rank_info, metrics_logger))


def _steps(
    config: Config,
    rank_info: RankInfo,
    train_step: TrainStep,
    train: Source,
    start: int,
    steps: int,
    metrics_logger: MetricsLogger,
    watchdog: Watchdog,
) -> Iterator[int]:
    """Train from step `start` to `steps`; gives the number of steps done, the first time before any."""
    yield start
    run, data = config.run, config.data
    epoch_steps = steps // run.epochs
    averages = Averages()
    unreadable = UnreadableImages(Path(run.dir), rank_info.rank)
    batches = train_batches(train, data, run.seed, rank_info.rank, rank_info.world_size, start, steps, rank_info.device)
    hosts, flops = host_names(), step_flops(config)
    collapsed: str | None = None  # said once
    first, seconds = start, 0.0  # since the last row; what is done between steps does not count
    with trace_steps(Path(run.dir) / "trace.json.gz", run.profile if rank_info.rank == 0 else 0) as tracer:
        for step in range(start + 1, steps + 1):
            watchdog.expect(f"step {step}", run.long_timeout if step == start + 1 else run.step_timeout)
            before = time.perf_counter()
            with train_step.phases("data"):
                batch = next(batches)
            unreadable.add(batch.unreadable)
            with train_step.phases("normalize"):
                views = batch.normalized(rank_info.device)
            rates = rates_at(config, step - 1, steps)
            seed = int(hash_counters(run.seed, NETWORK, step)[0] >> np.uint64(2))
            try:
                metrics = train_step.step(views, seed, rates)
            except NotFinite as error:
                watchdog.expect(f"the dump of step {step}", run.long_timeout)
                told = replay.dump(Path(run.dir), step, train_step, views, batch.samples, seed, rates, error)
                raise ValueError(f"step {step}: {error}; checkpoints stay as they are; {told}") from error
            averages.add(metrics)
            metrics_logger.advance(step)
            if tracer:
                tracer.step()
            if step % run.log_every == 0 or step % run.save_every == 0 or step == steps:
                row = averages.pop()
                seconds += time.perf_counter() - before
                if not all(map(math.isfinite, row.values())):
                    raise ValueError(f"step {step}: not finite: {row}; checkpoints stay as they are")
                row |= train_step.method.metrics()
                if not collapsed and (collapsed := collapse(row)) and rank_info.rank == 0:
                    log.warning("step %d: %s", step, collapsed)
                row |= rates._asdict()
                images = step * data.batch_size
                row |= _speed(
                    gather_phase_times(train_step.phases.pop(), step - first),
                    step - first,
                    seconds,
                    data.batch_size,
                    flops,
                    rank_info,
                    hosts,
                )
                row |= {**peak_memory(rank_info.device), "unreadable": unreadable.total()}
                metrics_logger.log({"step": step, "epoch": step / epoch_steps, "images": images, **row})
                unreadable.check_limit(min((step - start) * data.batch_size, len(train)), data.max_unreadable)
                first, seconds = step, 0.0
            else:
                seconds += time.perf_counter() - before
            yield step


def _speed(
    phases: dict[str, PhaseTimes],
    steps: int,
    seconds: float,
    images: int,
    flops: float,
    rank_info: RankInfo,
    hosts: list[str],
) -> Row:
    """What `steps` steps of `images` images and `flops` FLOPs each took; says so if a rank holds the others up."""
    if rank_info.rank == 0 and (late := find_straggler(phases, hosts)):
        log.warning("%s", late)
    row: Row = {"images_per_second": steps * images / seconds, "data_wait": steps * phases["data"].mean / seconds}
    row["teraflops"] = steps * flops / seconds / rank_info.world_size / 1e12
    if most := peak(rank_info.device):
        row["mfu"] = row["teraflops"] * 1e12 / most
    return {**row, "phases": phase_metrics(phases)}


def rates_at(config: Config, step: int, steps: int) -> Rates:
    """Learning rates and teacher's momentum for the step after `step` others, of `steps` in all."""
    optim, bank, method = config.optim, config.bank, config.method
    lr, final = (scaled_lr(x, config.data.batch_size) for x in (optim.lr, optim.lr_final))
    warmup_steps = optim.warmup * steps / config.run.epochs
    return Rates(
        lr=cosine(step, steps, lr, final, warmup_steps),
        bank_lr=_cosine_or_constant(step, steps, bank.lr, bank.lr_final),
        teacher_momentum=_cosine_or_constant(step, steps, method.teacher_momentum, method.teacher_momentum_final),
    )


def _cosine_or_constant(step: int, steps: int, start: float, final: float | None) -> float:
    return start if final is None else cosine(step, steps, start, final)


def _introduce(
    config: Config,
    rank_info: RankInfo,
    method: Method,
    parameters: int,
    train: Source,
    epoch_steps: int,
    saved: Path | None,
) -> None:
    """Say what will run, once."""
    batch, optim = config.data.batch_size, config.optim
    log.info("%d images, %d steps an epoch, %d epochs, batch %d", len(train), epoch_steps, config.run.epochs, batch)
    log.info(
        "%s: %s with %.2f M parameters, %s, %d ranks on %s",
        config.method.name,
        config.model.backbone,
        parameters / 1e6,
        config.engine.kind,
        rank_info.world_size,
        rank_info.device.type,
    )
    log.info("learning rate %g for a batch of %d (%g for 256)", scaled_lr(optim.lr, batch), batch, optim.lr)
    log.info(
        "data by %s, %d workers a rank",
        config.data.backend_for(rank_info.device),
        config.data.workers_for(rank_info.device),
    )
    if negatives := method.bank or method.queue:
        log.info(
            "%d negatives, %s over %d ranks, %s kernels",
            negatives.size,
            config.bank.placement,
            rank_info.world_size,
            negatives.kernels,
        )
    if saved:
        log.info("continuing from %s", saved)


def _results(config: Config, rank_info: RankInfo, metrics_logger: MetricsLogger) -> dict[str, Any]:
    """What the finished run reached. Rows that a full disk did not take are missing in it."""
    rows = read_rows(metrics_logger.path)
    accuracies = [row["knn"] for row in rows if "knn" in row]
    trained = [row for row in rows if "loss" in row]
    images = np.diff([0, *(row["images"] for row in trained)])
    seconds = images / np.array([row["images_per_second"] for row in trained])
    waited = seconds * np.array([row["data_wait"] for row in trained])
    device = (
        torch.cuda.get_device_name() if rank_info.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    results: dict[str, Any] = {}
    if accuracies:
        results |= {"knn_untrained": accuracies[0], "knn": accuracies[-1]}
        results |= {"k": config.eval.k, "temperature": config.eval.temperature}
    if trained:
        results |= {"epochs": config.run.epochs, "images": trained[-1]["images"], "seconds": metrics_logger.seconds}
        results |= {"images_per_second": images.sum() / seconds.sum(), "data_wait": waited.sum() / seconds.sum()}
        results |= {"memory_gib": trained[-1]["memory_gib"]}
    return {**results, "ranks": rank_info.world_size, "device": device, "torch": torch.__version__}
