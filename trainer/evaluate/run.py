"""Runs an evaluation in its own directory, RUN/NAME, where the same command continues it after an interruption.

settings.json       what the results depend on: checksum of the weights, data, settings
metrics.jsonl       and tensorboard/, checkpoints/, stop, stopped.json, index-*.npz, unreadable-*.txt: as in a run
subset.txt          names of the labelled images (finetune)
results.json        the results
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.build import check_image_sizes
from trainer.config import Config
from trainer.config_file import flatten
from trainer.distributed import RankInfo, process_group, raise_on_all_ranks
from trainer.evaluate.base import RESULTS, EvaluationContext, Evaluator, Results
from trainer.evaluate.features import image_size
from trainer.evaluate.registry import load_evaluator
from trainer.interop.weights import CheckpointChoice, load_encoder, to_device
from trainer.ops.stop import interruptible
from trainer.run.directory import lock_directory, read_config
from trainer.run.files import exists, read_json, write_json
from trainer.run.images import fingerprint
from trainer.run.metrics import set_up_logging
from trainer.run.results import write_results
from trainer.run.trackers import log_results


def run_evaluation(
    verb: str, run: Path, overrides: list[str], folder_name: str | None, choice: CheckpointChoice
) -> None:
    """Evaluate a checkpoint of a run, or an imported model, and print the results as one line of JSON.

    An interrupted evaluation continues; the results of a finished one are printed again.

    Args:
        verb: A key of `trainer.evaluate.registry.EVALUATIONS`, or a reference to an evaluation from outside.
        run: The run directory.
        overrides: Settings of the command line, `section.key=value`.
        folder_name: The directory in `run` for the evaluation; None for the default of the evaluation.
        choice: The network and checkpoint to evaluate.

    Raises:
        ValueError: `run` is not a run, it has no usable checkpoint, or something that the evaluation needs is missing.
        trainer.ops.stop.Stopped: The evaluation was asked to stop early.
    """
    started = time.time()
    evaluator, config = load_evaluator(verb), read_config(run, overrides)
    with process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        results = evaluate(evaluator, run, config, folder_name, choice, rank_info, started)
        if rank_info.rank == 0:
            print(json.dumps(results))


def evaluate(
    evaluator: Evaluator,
    run: Path,
    config: Config,
    folder_name: str | None,
    choice: CheckpointChoice,
    rank_info: RankInfo,
    started: float,
) -> Results:
    """Return the results on all ranks, computing them if RUN/NAME does not have them yet. Collective.

    Args:
        evaluator: The evaluation.
        run: The run directory.
        config: The configuration of the run, with overrides.
        folder_name: NAME; None for the default of the evaluation.
        choice: The network and checkpoint to evaluate.
        rank_info: This process.
        started: When this process started, in seconds of the epoch.

    Raises:
        RuntimeError: The evaluation changed the backbone.
        ValueError: On all ranks, if RUN/NAME has another evaluation, or something that the evaluation needs is missing.
    """
    encoder, step = load_encoder(run, config, choice)
    check_image_sizes(encoder, config, {image_size(config)})
    to_device(encoder, rank_info.device)
    checksum = weights_checksum(encoder.backbone)
    trained = read_config(run)
    name = folder_name or _default_name(evaluator.folder_name(config, trained), run, choice, step)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"--name: got {name!r}, need a name of letters, digits, - and . for a directory in {run}")
    with lock_directory(run / name, rank_info, _check_directory) as folder:
        same_images = config.data.paths == trained.data.paths
        context = EvaluationContext(encoder, config, rank_info, folder, run if same_images else folder, started, {})
        with interruptible(folder, by_file=False):
            sources = evaluator.open_sources(context)
        settings = {
            "backbone": checksum,
            "size": image_size(config),
            "precision": config.run.precision,
            **({"crop": config.eval.crop} if config.eval.crop else {}),
            **evaluator.settings(config),
            **{name: fingerprint(source) for name, source in sources.items()},
        }
        raise_on_all_ranks(_store_settings(folder, settings) if rank_info.rank == 0 else None)
        if not exists(folder / RESULTS):
            results = evaluator.evaluate(context._replace(sources=sources))
            if weights_checksum(encoder.backbone) != checksum:
                raise RuntimeError("the backbone has changed during its evaluation: the results would be meaningless")
            origin = {"network": choice.network, "step": step, **_hardware(rank_info)}
            write_results(folder / RESULTS, {**results, **origin} if rank_info.rank == 0 else None)
            if rank_info.rank == 0:
                stored = read_json(folder / RESULTS)  # numbers of NumPy are Python's there
                log_results(config.monitor, run, folder, step, {name: stored[name] for name in results})
        return read_json(folder / RESULTS)


def _default_name(name: str, run: Path, choice: CheckpointChoice, step: int) -> str:
    """Add the network, and the step if it was chosen or if the directory has the results of another step."""
    if choice.network == "teacher":
        name += "-teacher"
    taken = read_json(run / name / RESULTS).get("step", step) != step
    return f"{name}-step{step}" if taken or choice.step is not None else name


def _check_directory(folder: Path) -> None:
    """Raise ValueError if the directory has something else than an evaluation."""
    # What a start that found no usable images leaves.
    known = re.compile(r"lock|stop|stopped\.json|index-(train|val|more_val\.\w+)\.npz")
    if not (folder / "settings.json").exists() and any(not known.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not the directory of an evaluation. Choose another --name")


def _store_settings(folder: Path, settings: dict[str, Any]) -> str | None:
    """Write settings.json. Return an error message if the directory has another evaluation, or cannot be written."""
    stored = folder / "settings.json"
    if stored.exists():
        before, now = flatten(read_json(stored)), flatten(json.loads(json.dumps(settings)))
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        started = any(folder.rglob(RESULTS)) or any(folder.rglob("checkpoints/step-*"))
        if changed and started:
            listed = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in changed)
            return f"{folder} holds another evaluation: {listed}. Choose another --name (in a SLURM job: NAME=…)"
    try:
        write_json(stored, settings)
    except OSError as error:
        return f"settings not saved: {error}"
    return None


def weights_checksum(network: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers. It changes if any bit does."""
    digest = hashlib.sha256()
    for name, x in sorted(network.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hardware(rank_info: RankInfo) -> dict[str, Any]:
    on_gpu = rank_info.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"ranks": rank_info.world_size, "device": device, "torch": torch.__version__}
