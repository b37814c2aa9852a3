"""Fine-tuning with few labels: accuracy of the whole network after training on 1 % or 10 % of the labels.

The semi-supervised protocol of SimCLR (arXiv 2002.05709, app. B.5, code https://github.com/google-research/simclr): the
backbone and a new linear layer are trained on random resized crops and flips of the labelled images, for 60 epochs with
1 % of the labels and 30 epochs with more. SGD has Nesterov momentum 0.9, learning rate 0.05 for 256 images, no warm-up
and no weight decay. SimCLR uses batches of 4,096; here they have 256, and the learning rate follows half a cosine to
zero. BatchNorm is synchronised over all ranks, so that the result does not depend on their number.

The published subsets are lists of image names (finetune.subset_list); without a list, the subset is drawn by
`data.sources.subset`.
"""

import copy
import hashlib
import logging
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from rich.console import Console
from rich.table import Table

from data.order import steps_per_epoch
from data.settings import PathText
from data.sources.base import Source
from data.sources.subset import Subset, draw_balanced, find_named, read_names
from models.batchnorm import synchronise_bn
from trainer.engines.optim import Sgd, backbone_groups, cosine, scaled_lr
from trainer.evaluate.base import RESULTS, EvaluationContext, Evaluator, Results, labelled_sources
from trainer.evaluate.probe import MOMENTUM, Classifier, CropScale, score
from trainer.run.files import read_json, write_atomically, write_json
from trainer.schema import Section

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)


class Settings(Section):
    """Fine-tuning with few labels."""

    labels: float = Field(0.01, gt=0, le=1, description="Share of the training images whose labels are used.")
    subset_list: PathText | None = Field(
        None, description="File with the names of the labelled images, one per line, which replaces labels."
    )
    subset_seed: int = Field(0, ge=0, lt=2**63, description="Seed of the choice of the labelled images.")
    seeds: tuple[int, ...] = Field(
        (0, 1, 2), description="Seeds of the new layer, the order and the crops; there is one training for each."
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="Optimizer: SGD with Nesterov momentum, or AdamW.")
    lr: float = Field(0.05, gt=0, description="Learning rate for a batch size of 256; it scales with the batch size.")
    head_lr: float = Field(1.0, gt=0, description="Factor of the learning rate of the new layer.")
    layer_decay: float = Field(1.0, gt=0, le=1, description="Layer-wise learning-rate decay factor.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of matrices and filters.")
    batch_size: int = Field(256, ge=1, description="Batch size over all ranks.")
    epochs: int | None = Field(
        None, ge=1, description="Number of epochs; null: 60 with up to 1 % of the labels, 30 with more."
    )
    scale: CropScale = Field((0.08, 1.0), description="Area of the random crops, as a share of the image's area.")
    save_every: int = Field(1000, ge=1, description="Steps between checkpoints.")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError("need different numbers from 0 on")
        return seeds


def _folder_name(config: "Config", trained: "Config") -> str:
    finetune = config.finetune
    return f"finetune-{Path(finetune.subset_list).stem if finetune.subset_list else f'{100 * finetune.labels:g}pct'}"


def _settings(config: "Config") -> dict[str, Any]:
    finetune = config.finetune.model_dump(exclude={"save_every"})
    names = _listed_names(config.finetune)
    checksum = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest() if names else None
    return {**finetune, "subset_list": checksum}


def _evaluate(context: EvaluationContext) -> Results:
    """Train once for each seed, in the directories seed-N."""
    finetune = context.config.finetune
    all_images, test = context.sources["train"], context.sources["val"]
    train = Subset(all_images, _labelled_samples(all_images, finetune))
    if context.rank_info.rank == 0:
        write_atomically(context.folder / "subset.txt", "".join(f"{train.name(i)}\n" for i in range(len(train))))
    share = len(train) / len(all_images)
    epochs = finetune.epochs or (60 if round(share, 3) <= 0.01 else 30)
    log.info("%d of %d images with labels, %d epochs", len(train), len(all_images), epochs)
    results = [_train_seed(seed, epochs, train, test, context) for seed in finetune.seeds]
    counts = np.bincount(train.labels, minlength=len(train.classes))
    summary = {
        **summarise(results),
        "classes": len(train.classes),
        "protocol": "fine-tuning",
        "labels": len(train),
        "labels_a_class": [int(counts.min()), int(counts.max())],
        "epochs": epochs,
        "seeds": results,
    }
    if context.rank_info.rank == 0:
        _print_table(summary)
    return summary


EVALUATOR = Evaluator(_folder_name, _settings, _evaluate, labelled_sources)


def _listed_names(finetune: Settings) -> list[str] | None:
    """Return the names in finetune.subset_list. Raises ValueError if the file cannot be read."""
    if finetune.subset_list is None:
        return None
    try:
        return read_names(Path(finetune.subset_list))
    except OSError as error:
        raise ValueError(f"finetune.subset_list: {finetune.subset_list}: {error.strerror}") from error


def _labelled_samples(source: Source, finetune: Settings) -> NDArray[np.int64]:
    """Return the sorted indices of the images whose labels are used, int64."""
    if names := _listed_names(finetune):
        return find_named(source, names, Path(str(finetune.subset_list)))
    return draw_balanced(source.labels, finetune.labels, finetune.subset_seed)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation over the seeds; the deviation of one seed is None."""
    summary: dict[str, Any] = {}
    for key in ("top1", "top5"):
        values = [result[key] for result in results]
        summary[key] = statistics.fmean(values)
        summary[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return {**summary, "images": results[0]["images"], "unreadable": results[0]["unreadable"]}


def parameter_groups(network: Classifier, finetune: Settings) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, each with `lr_scale`, the factor of its learning rate.

    The factor is 1 for the last layer of the backbone and head_lr for the new layer. Vectors and scalars of the
    backbone have no weight decay.
    """
    decay = finetune.weight_decay
    head = {"params": list(network.head.parameters()), "weight_decay": decay, "lr_scale": finetune.head_lr}
    return [*backbone_groups(network.backbone, decay, finetune.layer_decay), head]


def _train_seed(seed: int, epochs: int, train: Source, test: Source, context: EvaluationContext) -> Results:
    """Train and evaluate a network, unless the directory of the seed already has its results."""
    from trainer.evaluate.fit import Recipe, fit

    folder, rank_info, finetune = context.folder / f"seed-{seed}", context.rank_info, context.config.finetune
    if (folder / RESULTS).exists():
        return read_json(folder / RESULTS)
    if rank_info.rank == 0:
        folder.mkdir(exist_ok=True)
    network = Classifier(copy.deepcopy(context.encoder), len(train.classes), frozen=False, seed=seed)
    if rank_info.world_size > 1:
        synchronise_bn(network, rank_info.device)
    lr = scaled_lr(finetune.lr, finetune.batch_size)
    groups = parameter_groups(network, finetune)
    optimizer: torch.optim.Optimizer
    if finetune.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    else:
        optimizer = Sgd(groups, lr=lr, momentum=MOMENTUM, nesterov=True)
    steps = steps_per_epoch(len(train), finetune.batch_size) * epochs

    def lr_at(step: int) -> float:
        return cosine(step, steps, lr, 0.0)

    recipe = Recipe(finetune.batch_size, epochs, lr_at, finetune.scale, seed, finetune.save_every)
    seconds = fit(network, optimizer, train, recipe, context, folder)
    with context.interruptible():
        scores = score(network, test, train.classes, context)
    result = {"seed": seed, **scores._asdict(), "seconds": seconds}
    if rank_info.rank == 0:
        write_json(folder / RESULTS, result)
    return result


def _print_table(results: dict[str, Any]) -> None:
    table = Table("seed", "top-1", "top-5", box=None, pad_edge=False)
    for result in results["seeds"]:
        table.add_row(str(result["seed"]), f"{result['top1']:.4f}", f"{result['top5']:.4f}")
    if len(results["seeds"]) > 1:
        means = (f"{results[key]:.4f} ± {results[f'{key}_deviation']:.4f}" for key in ("top1", "top5"))
        table.add_row("mean", *means)
    Console(stderr=True).print(table)
