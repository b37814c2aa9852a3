"""What linear, finetune and voc07 have in common: the encoder, and a folder RUN/NAME that continues what was stopped.

settings.json       what the result depends on: the weights' checksum, data, settings; another evaluation is refused
metrics.jsonl       and tensorboard/, checkpoints/, stop, stopped.json, index-*.npz, unreadable-*.txt: as in a run
subset.txt          names of the labelled images (finetune)
results.json        what came out
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from data.sources.open import Source
from models.encoder import Encoder
from trainer import distributed
from trainer.config import Config
from trainer.config_file import flatten
from trainer.distributed import RankInfo
from trainer.interop.weights import CheckpointChoice, load_encoder, to_device
from trainer.run.directory import lock_directory, read_config
from trainer.run.files import read_json, write_json
from trainer.run.metrics import set_up_logging
from trainer.run.sources import open_sources

RESULTS = "results.json"

Results = dict[str, Any]


class Job(NamedTuple):
    """What an evaluation is given: a frozen encoder, where it writes, and when the process started (time.time)."""

    encoder: Encoder
    config: Config
    rank_info: RankInfo
    folder: Path
    started: float


class Evaluator(NamedTuple):
    """name: of the folder. settings: what the result depends on beside weights, image size and precision.

    evaluate: called by all ranks, with results on rank 0 at least.
    """

    name: Callable[[Config], str]
    settings: Callable[[Config], dict[str, Any]]
    evaluate: Callable[[Job], Results]


def run_evaluation(
    verb: Evaluator, run: Path, overrides: list[str], name: str | None, choice: CheckpointChoice
) -> None:
    """Evaluate a checkpoint of a run, or an imported model, into RUN/NAME, and print the result as one JSON line.

    Goes on where it was stopped; what is finished is only printed. Raises ValueError if there is no run, no usable
    checkpoint, or what the evaluation needs is missing, and `trainer.ops.stop.Stopped` where it was asked to end early.
    """
    started = time.time()
    config = read_config(run, overrides)
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        results = evaluate(verb, run, config, name, choice, rank_info, started)
        if rank_info.rank == 0:
            print(json.dumps(results))


def evaluate(
    verb: Evaluator,
    run: Path,
    config: Config,
    name: str | None,
    choice: CheckpointChoice,
    rank_info: RankInfo,
    started: float,
) -> Results:
    """The results, on all ranks. Raises RuntimeError if the encoder is not bit for bit what it was."""
    encoder, step = load_encoder(run, config, choice)
    to_device(encoder, rank_info.device)
    before = fingerprint(encoder.backbone)
    settings = {
        "backbone": before,
        "size": config.eval.size or config.data.views[0].size,
        "precision": config.run.precision,
        **verb.settings(config),
    }
    if not name:
        of_step = "" if choice.step is None else f"-step{step}"
        name = verb.name(config) + ("-teacher" if choice.network == "teacher" else "") + of_step
    with opened(run, name, settings, rank_info) as folder:
        if not (folder / RESULTS).exists():
            results = verb.evaluate(Job(encoder, config, rank_info, folder, started))
            if fingerprint(encoder.backbone) != before:
                raise RuntimeError("the backbone has changed while it was evaluated: the result would mean nothing")
            if rank_info.rank == 0:
                origin = {"network": choice.network, "step": step}
                write_json(folder / RESULTS, {**results, **origin, **machine(rank_info)})
        dist.barrier()
        return read_json(folder / RESULTS)


@contextmanager
def opened(run: Path, name: str, settings: dict[str, Any], rank_info: RankInfo) -> Iterator[Path]:
    """RUN/NAME, new or taken up from an earlier start of the same evaluation, and kept from other processes.

    Raises ValueError, on all ranks, if it is that of another evaluation or of something else, or in use.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"--name: got {name!r}, need letters, digits and - only: it names a folder in {run}")
    with lock_directory(
        run / name, rank_info, lambda folder: _take(folder, json.loads(json.dumps(settings)))
    ) as folder:
        yield folder


def _take(folder: Path, settings: dict[str, Any]) -> None:
    stored = folder / "settings.json"
    if stored.exists():
        before, now = flatten(read_json(stored)), flatten(settings)
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        if changed:
            listed = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in changed)
            raise ValueError(
                f"{folder} holds another evaluation: {listed}. Choose another --name (slurm/linear.sh: NAME=…)"
            )
    elif any(path.name not in ("lock", "stop") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not the folder of an evaluation. Choose another --name")
    write_json(stored, settings)


def labelled_sources(config: Config, folder: Path) -> tuple[Source, Source]:
    """Training and validation images. Raises ValueError if there are none of the latter, or no classes."""
    train, test = open_sources(config.data, folder)
    if test is None:
        raise ValueError("an evaluation needs labelled images to test on; give data.val=…")
    if len(train.classes) < 2:
        raise ValueError(f"an evaluation needs labels, and {config.data.train} has one class, {train.classes[0]}")
    return train, test


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: one bit more or less gives another."""
    digest = hashlib.sha256()
    for name, x in sorted(network.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def machine(rank_info: RankInfo) -> dict[str, Any]:
    """What a result was made on."""
    device = (
        torch.cuda.get_device_name() if rank_info.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"ranks": rank_info.world_size, "device": device, "torch": torch.__version__}
