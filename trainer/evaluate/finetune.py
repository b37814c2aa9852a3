"""Fine-tuning with few labels: how far a pre-trained backbone gets with 1 % or 10 % of them.

Semi-supervised protocol of SimCLR (arXiv 2002.05709, app. B.5, code https://github.com/google-research/simclr): all of
the network is trained on the labelled images, from the backbone and a new linear layer, by SGD with Nesterov's momentum
0.9, learning rate 0.05 for 256 images, no warm-up, no weight decay; random resized crops and flips; 60 epochs with 1 %
of the labels, 30 with 10 % or all. Ours are batches of 256, not 4,096, and half a cosine to zero. BatchNorm is over all
ranks' batches, so that the result does not depend on their number.

The published subsets are files of names (finetune.subset_list); without one the subset is drawn by
`data.sources.subset`.
"""

import copy
import hashlib
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from timm.optim import param_groups_layer_decay

from data.order import steps_per_epoch
from data.sources.base import Source
from data.sources.subset import Subset, draw_balanced, find_named, read_names
from models.batchnorm import synchronise_bn
from trainer.config import Config, Finetune
from trainer.engines.optim import cosine, scaled_lr
from trainer.evaluate.base import RESULTS, EvaluationContext, Evaluator, Results, labelled_sources
from trainer.evaluate.probe import MOMENTUM, Classifier, Recipe, fit, score
from trainer.run.files import read_json, write_atomically, write_json

log = logging.getLogger(__name__)


def _settings(config: Config) -> dict[str, Any]:
    finetune = config.finetune.model_dump(exclude={"save_every"})
    finetune["subset_list"] = checksum(names_of(config.finetune))
    return {"train": config.data.train, "val": config.data.val, **finetune}


def _evaluate(context: EvaluationContext) -> Results:
    """One training for each seed, in folders seed-N. Raises ValueError where the list of images does not fit them."""
    finetune = context.config.finetune
    whole, test = labelled_sources(context)
    train = Subset(whole, labelled(whole, finetune))
    if context.rank_info.rank == 0:
        write_atomically(context.folder / "subset.txt", "".join(f"{train.name(i)}\n" for i in range(len(train))))
    count = epochs(finetune, len(train) / len(whole))
    log.info("%d of %d images with labels, %d epochs", len(train), len(whole), count)
    results = [_one_seed(seed, count, train, test, context) for seed in finetune.seeds]
    counts = np.bincount(train.labels, minlength=len(train.classes))
    summary = {
        **summarise(results),
        "classes": len(train.classes),
        "protocol": "fine-tuning",
        "labels": len(train),
        "labels_a_class": [int(counts.min()), int(counts.max())],
        "epochs": count,
        "seeds": results,
    }
    if context.rank_info.rank == 0:
        _show(summary)
    return summary


def _folder_name(config: Config, trained: Config) -> str:
    finetune = config.finetune
    return f"finetune-{Path(finetune.subset_list).stem if finetune.subset_list else f'{100 * finetune.labels:g}pct'}"


EVALUATOR = Evaluator(_folder_name, _settings, _evaluate)


def epochs(finetune: Finetune, share: float) -> int:
    """`share`: of the training images, those with labels."""
    return finetune.epochs or (60 if round(share, 3) <= 0.01 else 30)


def names_of(finetune: Finetune) -> list[str] | None:
    """The list of labelled images. Raises ValueError if it cannot be read."""
    if finetune.subset_list is None:
        return None
    try:
        return read_names(Path(finetune.subset_list))
    except OSError as error:
        raise ValueError(f"finetune.subset_list: {finetune.subset_list}: {error.strerror}") from error


def checksum(names: list[str] | None) -> str | None:
    """SHA-256 of a list of names, None for none."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest() if names else None


def labelled(source: Source, finetune: Finetune) -> NDArray[np.int64]:
    """The numbers of the samples whose labels are used, int64, sorted."""
    if names := names_of(finetune):
        return find_named(source, names, Path(str(finetune.subset_list)))
    return draw_balanced(source.labels, finetune.labels, finetune.subset_seed)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds, and the deviation of a sample (divided by their number less one; None for one seed)."""
    summary: dict[str, Any] = {}
    for key in ("top1", "top5"):
        values = [result[key] for result in results]
        summary[key] = statistics.fmean(values)
        summary[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return {**summary, "images": results[0]["images"], "unreadable": results[0]["unreadable"]}


def groups(network: Classifier, finetune: Finetune) -> list[dict[str, Any]]:
    """The optimizer's parameter groups; `lr_scale`: that of the layer, 1 for the backbone's last, head_lr for the head.

    Vectors and scalars have no weight decay.
    """
    decay, layers = finetune.weight_decay, finetune.layer_decay
    backbone = param_groups_layer_decay(network.backbone, decay, layer_decay=layers)
    most = max(group["lr_scale"] for group in backbone)
    head = {"params": list(network.head.parameters()), "weight_decay": decay, "lr_scale": finetune.head_lr}
    return [*({**group, "lr_scale": group["lr_scale"] / most} for group in backbone), head]


def _one_seed(seed: int, epochs: int, train: Source, test: Source, context: EvaluationContext) -> Results:
    folder, rank_info, finetune = context.folder / f"seed-{seed}", context.rank_info, context.config.finetune
    if (folder / RESULTS).exists():
        return read_json(folder / RESULTS)
    if rank_info.rank == 0:
        folder.mkdir(exist_ok=True)
    network = Classifier(copy.deepcopy(context.encoder), len(train.classes), frozen=False, seed=seed)
    if rank_info.world_size > 1:
        synchronise_bn(network, rank_info.device)
    lr = scaled_lr(finetune.lr, finetune.batch_size)
    optimizer: torch.optim.Optimizer
    if finetune.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups(network, finetune), lr=lr)
    else:
        optimizer = torch.optim.SGD(groups(network, finetune), lr=lr, momentum=MOMENTUM, nesterov=True)
    steps = steps_per_epoch(len(train), finetune.batch_size) * epochs
    recipe = Recipe(
        finetune.batch_size,
        epochs,
        lambda step: cosine(step, steps, lr, 0.0),
        finetune.scale,
        seed,
        finetune.save_every,
    )
    seconds = fit(network, optimizer, train, recipe, context, folder)
    result = {"seed": seed, **score(network, test, train.classes, context)._asdict(), "seconds": seconds}
    if rank_info.rank == 0:
        write_json(folder / RESULTS, result)
    return result


def _show(results: dict[str, Any]) -> None:
    table = Table("seed", "top-1", "top-5", box=None, pad_edge=False)
    for result in results["seeds"]:
        table.add_row(str(result["seed"]), f"{result['top1']:.4f}", f"{result['top5']:.4f}")
    if len(results["seeds"]) > 1:
        means = (f"{results[key]:.4f} ± {results[f'{key}_deviation']:.4f}" for key in ("top1", "top5"))
        table.add_row("mean", *means)
    Console(stderr=True).print(table)
