"""Pre-training: from a configuration to a finished run directory."""

import copy
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.loader import train_batches
from data.order import steps_per_epoch
from data.random import NETWORK, hash_counters
from models.health import HealthCheck
from trainer import distributed
from trainer.build import full_student, initialise_negatives
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.finite import NotFinite, StepResult
from trainer.engines.optim import cosine, scaled_lr
from trainer.evaluate import knn
from trainer.evaluate.features import Features
from trainer.evaluate.online_probe import make_probe
from trainer.evaluate.spread import measure_spread
from trainer.external import short_name
from trainer.interop.import_ import initial_weights
from trainer.interop.weights import load_encoder
from trainer.loop import LoopSettings, device_name, train
from trainer.ops import replay
from trainer.ops.stop import interruptible
from trainer.plan.flops import step_flops
from trainer.run import checkpoint
from trainer.run.directory import claim
from trainer.run.files import exists
from trainer.run.metrics import set_up_logging
from trainer.run.results import Row, more_knn, read_rows, write_results
from trainer.run.sources import Sources, check_batch, check_shared_memory, open_sources
from trainer.train_step import Rates, TrainStep

log = logging.getLogger(__name__)


def pretrain(config: Config) -> None:
    """Train to the end, from the newest intact checkpoint in the run directory or from the start, and evaluate.

    Raises:
        ValueError: A user error in the data, the run directory or the sizes; or, on all ranks, a loss or gradient that
            is not finite.
        trainer.ops.stop.Stopped: The user, SLURM or a time limit asked for an early end; a checkpoint is saved.
    """
    process_start = time.time()
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        with claim(config, rank_info) as folder:
            if exists(folder / "results.json"):
                log.info("%s is finished: nothing to do", folder)
            else:
                _pretrain(config, rank_info, folder, process_start)


def _pretrain(config: Config, rank_info: RankInfo, folder: Path, process_start: float) -> None:
    with interruptible(folder, by_file=False):
        sources = open_sources(config.data, folder, record=True)
        training = sources.train
        check_batch(config, training)
        check_shared_memory(config, training, rank_info)
        settings = _loop_settings(
            config, folder, len(training), has_validation=sources.val is not None, start=process_start
        )
        saved = checkpoint.newest(folder / "checkpoints")
        # The weights to start from are read only once: later starts continue from the checkpoints.
        initial = None
        if config.model.weights and not saved:
            initial = load_encoder(initial_weights(config, rank_info), config)[0]
        train_step = TrainStep(config, rank_info, copy.deepcopy(initial))
        start = 0
        if saved:
            start = train_step.load(saved)
        else:
            initialise_negatives(train_step.method, config, rank_info, training, initial)
        if rank_info.rank == 0:
            _log_start(config, rank_info, train_step, settings, saved)
        task = Pretraining(config, rank_info, train_step, sources, settings.steps)
        if saved:
            task.load_probe(saved)
        rank, world_size, device = rank_info.rank, rank_info.world_size, rank_info.device
        batches = train_batches(training, config.data, config.run.seed, rank, world_size, start, settings.steps, device)
    seconds = train(task, batches, start, settings, rank_info)
    rows = read_rows(folder / "metrics.jsonl") if rank_info.rank == 0 else []
    classes = len(training.classes)
    results = _results(config, rank_info, rows, seconds, classes) if rank_info.rank == 0 else None
    write_results(folder / "results.json", results)
    if results and sources.val and "knn_initial" in results:
        before, after = results["knn_initial"], results["knn"]
        standard_error = math.sqrt(before * (1 - before) / len(sources.val))
        if before - after > 2 * standard_error:
            log.warning(
                f"kNN fell from {before:.4f} with the initial weights to {after:.4f} (standard error "
                f"{standard_error:.4f}): lower optim.lr or optim.layer_decay, or raise optim.frozen_epochs"
            )


class Pretraining:
    """The pre-training of a method, as `trainer.loop.Task`."""

    def __init__(
        self,
        config: Config,
        rank_info: RankInfo,
        train_step: TrainStep,
        sources: Sources,
        steps: int,
    ) -> None:
        """Takes over a `train_step` that is initialised or loaded; `steps` is the length of the schedules."""
        self.config, self.rank_info, self.train_step, self.steps = config, rank_info, train_step, steps
        self.sources = sources
        self.phases, self.flops = train_step.phases, step_flops(config)
        self.rates = rates_at(config, 0, steps)
        self.health = HealthCheck()
        self.probe = make_probe(config, len(sources.train.classes), train_step.method.student, rank_info.device)

    def step(self, batch: Batch, step: int) -> StepResult:
        """See `trainer.loop.Task.step`."""
        with self.phases("normalize"):
            views = batch.to(self.rank_info.device)
        self.rates = rates_at(self.config, step - 1, self.steps)
        result = self.train_step.step(views, self._seed(step), self.rates)
        if self.probe:
            with self.phases("probe"):
                labels_B = self._labels(batch).chunk(self.train_step.accumulate)[-1]
                result.metrics.update(self.probe.step(labels_B, self.train_step.intact))
        return result

    def log_values(self, step: int, averages: dict[str, float]) -> dict[str, float]:
        """Return the method's own metrics and the rates, and warn once of each sign that the run does not learn."""
        values = self.train_step.method.metrics()
        for sign in self.health.new_signs(averages | values):
            if self.rank_info.rank == 0:
                log.warning("step %d: %s", step, sign)
        return values | {name: rate for name, rate in self.rates._asdict().items() if rate is not None}

    def describe_failure(self, error: NotFinite, batch: Batch, step: int) -> str:
        """Dump the step for `python -m trainer replay`."""
        views, rates = batch.to(self.rank_info.device), rates_at(self.config, step - 1, self.steps)
        inputs = replay.StepInputs(views, batch.samples, self._seed(step), rates)
        return replay.dump(Path(self.config.run.dir), step, self.train_step, inputs, error)

    def state(self, step: int) -> dict[str, Any]:
        """See `trainer.loop.Task.state`."""
        return self.train_step.state(step) | ({"probe": self.probe.state_dict()} if self.probe else {})

    def load_probe(self, saved: Path) -> None:
        """Continue with the probe of a checkpoint; one without it, or of other classes, leaves a fresh one."""
        if self.probe:
            tensors = {name: x.clone() for name, x in self.probe.state_dict().items()}
            try:
                checkpoint.load(saved, {"probe": tensors})
                self.probe.load_state_dict(tensors)
            except ValueError as error:
                if self.rank_info.rank == 0:
                    log.warning("the linear probe starts anew: %s", error)

    def evaluate(self, step: int) -> Row:
        """Return the kNN accuracy on each set of validation images, and on rank 0 the spread of the features of `val`.

        The first evaluation has the accuracy of the pixels of `val` as well.
        """
        train, val, more_val = self.sources
        assert val is not None
        student = full_student(self.train_step.method, self.train_step.engine, self.config, self.rank_info)
        device = self.rank_info.device
        tests = knn.name_tests(val, more_val)
        row: Row = {**knn.evaluate(student.backbone, train, tests, device, self.config, self._score)}
        if step == 0:
            row |= knn.evaluate_pixels(train, val, device, self.config)
        if self.rank_info.rank == 0:
            row |= measure_spread(student, val, device, self.config)
        return row

    def _score(self, name: str, features: Features) -> dict[str, float]:
        return {"probe_val_top1": self.probe.accuracy(features)} if self.probe and name == "knn" else {}

    def _labels(self, batch: Batch) -> Tensor:
        """Return the labels of a batch on the device, int64 [B], without waiting for it."""
        labels_B = torch.from_numpy(self.sources.train.labels[batch.samples.numpy()])
        if self.rank_info.device.type == "cuda":
            labels_B = labels_B.pin_memory()
        return labels_B.to(self.rank_info.device, non_blocking=True)

    def _seed(self, step: int) -> int:
        return int(hash_counters(self.config.run.seed, NETWORK, step)[0] >> np.uint64(2))


def rates_at(config: Config, step: int, steps: int) -> Rates:
    """Return the learning rates and the teacher's momentum for the step that follows `step` of `steps` steps."""
    optim, bank, method = config.optim, config.bank, config.method
    lr, final = (scaled_lr(x, config.data.batch_size) for x in (optim.lr, optim.lr_final))
    optim_warmup, bank_warmup = (x.warmup * steps / config.run.epochs for x in (optim, bank))
    bank_lr_final = bank.lr if bank.lr_final is None else bank.lr_final
    encoder_lr = cosine(step, steps, lr, final, optim_warmup)
    is_frozen = step < optim.frozen_epochs * steps / config.run.epochs
    return Rates(
        lr=encoder_lr,
        bank_lr=cosine(step, steps, bank.lr, bank_lr_final, bank_warmup),
        teacher_momentum=_cosine_or_constant(step, steps, method.teacher_momentum, method.teacher_momentum_final),
        backbone_lr=None if not optim.frozen_epochs else 0.0 if is_frozen else encoder_lr,
    )


def _cosine_or_constant(step: int, steps: int, start: float, final: float | None) -> float:
    return start if final is None else cosine(step, steps, start, final)


def _loop_settings(
    config: Config, folder: Path, num_images: int, *, has_validation: bool, start: float
) -> LoopSettings:
    run, data = config.run, config.data
    epoch = steps_per_epoch(num_images, data.batch_size)
    return LoopSettings(
        run_folder=folder,
        folder=folder,
        stop_folder=folder,
        process_start=start,
        steps=epoch * run.epochs,
        steps_per_epoch=epoch,
        batch_size=data.batch_size,
        num_images=num_images,
        max_unreadable=data.max_unreadable,
        save_every=run.save_every,
        keep=run.keep,
        keep_every=(run.keep_every or 0) * epoch,
        evaluate_every=config.eval.knn_every * epoch if has_validation else None,
        run=run,
        trackers=config.monitor,
    )


def _log_start(
    config: Config, rank_info: RankInfo, train_step: TrainStep, settings: LoopSettings, saved: Path | None
) -> None:
    """Log what is about to run."""
    method, device, batch_size, lr = train_step.method, rank_info.device, config.data.batch_size, config.optim.lr
    log.info(
        f"{settings.num_images} images, {settings.steps_per_epoch} steps an epoch, {config.run.epochs} epochs, "
        f"batch {batch_size}"
    )
    log.info(
        f"{short_name(config.method.name)}: {short_name(config.model.backbone)} with "
        f"{train_step.num_parameters / 1e6:.2f} M parameters, {config.engine.kind}, "
        f"{rank_info.world_size} ranks on {device.type}"
    )
    log.info(f"learning rate {scaled_lr(lr, batch_size):g} for a batch of {batch_size} ({lr:g} for 256)")
    log.info(f"data by {config.data.backend_for(device)}, {config.data.workers_for(device)} workers a rank")
    if negatives := method.negatives:
        log.info(f"{negatives.size} negatives, {config.bank.placement} over {rank_info.world_size} ranks")
    if saved:
        log.info(f"continuing from {saved}")


def _results(config: Config, rank_info: RankInfo, rows: list[Row], seconds: float, classes: int) -> dict[str, Any]:
    """Return what the finished run reached, from its log. Rows lost to a full disk are not included."""
    evaluated = [row for row in rows if "knn" in row]
    trained = [row for row in rows if "loss" in row]
    results: dict[str, Any] = {}
    if evaluated:
        if evaluated[0]["step"] == 0:  # not if data.val was given to a later start
            results |= {"knn_initial" if config.model.weights else "knn_untrained": evaluated[0]["knn"]}
        if pixels := [row["knn_pixels"] for row in rows if "knn_pixels" in row]:
            results |= {"knn_pixels": pixels[0]}
        results |= {"knn": evaluated[-1]["knn"]}
        results |= {f"knn_{name}": value for name, value in more_knn(evaluated[-1]).items()}
        results |= {key: evaluated[-1][key] for key in ("probe_val_top1",) if key in evaluated[-1]}
        results |= {"classes": classes, "k": config.eval.k, "temperature": config.eval.temperature}
    if trained:
        images = np.diff([0, *(row["images"] for row in trained)])
        step_seconds = images / np.array([row["images_per_second"] for row in trained])
        waited = step_seconds * np.array([row["data_wait"] for row in trained])
        results |= {"epochs": config.run.epochs, "images": trained[-1]["images"], "seconds": seconds}
        results |= {
            "images_per_second": images.sum() / step_seconds.sum(),
            "data_wait": waited.sum() / step_seconds.sum(),
        }
        results |= {"memory_gib": trained[-1]["memory_gib"]}
    device = device_name(rank_info.device)
    return {**results, "ranks": rank_info.world_size, "device": device, "torch": torch.__version__}
