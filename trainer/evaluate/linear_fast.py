"""The fast protocol of linear evaluation: features are computed once, then many linear classifiers train together.

There is a classifier for each learning rate and each weight decay. All of them train on the same batches, so that a
step is two matrix products. The features are those of a few random crops of each training image, one crop after another
in successive epochs, where the published protocol draws new crops in every epoch. The classifier that is best on the
central views of held-out training images is trained again on all training images.

Features are standardised with the same mean and scale for all images (mean 0, mean squared length 1), so that one range
of learning rates suits every backbone. A linear classifier of these is also one of the original features.

Shape suffixes: N images of a rank, V views of an image, S images of the data set, H classifiers, B images of a batch,
C classes, D features, of which the last is always 1 (its weight is the bias).
"""

import logging
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn

from data.batch import Crops
from data.order import samples_between, steps_per_epoch
from data.sources.base import Source
from data.sources.subset import draw_balanced
from data.views import View
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.engines.optim import cosine
from trainer.evaluate.base import EvaluationContext
from trainer.evaluate.features import forward_images, image_size
from trainer.evaluate.probe import CROPS_AND_FLIPS, MOMENTUM
from trainer.schema import Section

log = logging.getLogger(__name__)

_CHUNK = 4096  # rows that are processed together


class Settings(Section):
    """The fast protocol of linear evaluation."""

    lrs: tuple[float, ...] = Field(
        (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
        description="Learning rates to try, for features whose mean squared length is 1.",
    )
    weight_decays: tuple[float, ...] = Field(
        (0.0, 1e-6, 1e-5, 1e-4), description="Weight decays to try, each with every learning rate."
    )
    batch_size: int = Field(1024, ge=1, description="Batch size over all ranks.")
    epochs: int = Field(20, ge=1, description="Number of epochs.")
    holdout: float = Field(0.1, gt=0, lt=1, description="Share of the training images that choose the classifier.")
    crops: int = Field(
        4, ge=0, description="Random crops of each training image, drawn by linear.scale; 0: the central view only."
    )

    @field_validator("lrs", "weight_decays")
    @classmethod
    def _not_negative(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) < 0:
            raise ValueError("need at least one number, none below 0")
        return values


class CachedFeatures(NamedTuple):
    """The features of this rank's training images.

    Attributes:
        x_NVD: Standardised features, fp32 [N, V, D], on the device or in host memory. View 0 is the central one.
        row_S: Index in `x_NVD` of each image of the data set, int64 [S]; -1 on the ranks without its features.
        labels_S: Class of each image of the data set, int64 [S].
        classes: Number of classes.
        readable: Indices of the images that any rank has features of, int64, sorted.
        mean_D: Mean of the original features, fp32 [D - 1].
        scale: Root of the mean squared length of the original features after subtracting the mean.
        device: Where the classifiers train.
    """

    x_NVD: Tensor
    row_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]
    classes: int
    readable: NDArray[np.int64]
    mean_D: Tensor
    scale: float
    device: torch.device


class Candidate(NamedTuple):
    """A learning rate and a weight decay, for standardised features, and the accuracy on the held-out images."""

    lr: float
    weight_decay: float
    accuracy: float


def cache_features(source: Source, context: EvaluationContext) -> CachedFeatures:
    """Compute the features of every R-th image: of the central view and of fast.crops random crops. Collective.

    They stay on the GPU if they need less than half of its free memory, else in host memory, else in a temporary file.

    Raises:
        ValueError: On all ranks, if a rank can read none of its images.
    """
    encoder, rank_info, config, projection = context.encoder, context.rank_info, context.config, context.encoder.head[0]
    assert isinstance(projection, nn.Linear)
    device, crops = rank_info.device, config.fast.crops
    view = View(size=image_size(config), scale=config.linear.scale)
    mine = np.arange(rank_info.rank, len(source), rank_info.world_size)
    x_NVD = _allocate_features((len(mine), crops + 1, projection.in_features + 1), rank_info, context.folder)
    for v in range(crops + 1):
        crop = Crops(view, CROPS_AND_FLIPS, config.linear.seed, v - 1) if v else None
        numbers: list[Tensor] = []
        filled = 0
        for x_BD, batch_samples in forward_images(encoder, encoder.backbone, source, mine, device, config, crop):
            x_NVD[filled : filled + len(batch_samples), v, :-1] = x_BD.cpu()
            filled += len(batch_samples)
            numbers.append(batch_samples)
        raise_on_all_ranks(None if filled else f"data.train: none of {len(mine)} images can be read")
        if v == 0:
            mine = torch.cat(numbers).numpy()
        raise_on_all_ranks(
            None if filled == len(mine) else "data.train: some images could be read at first, but not again"
        )
    x_NVD = x_NVD[: len(mine)]
    all_samples: list[NDArray[np.int64]] = [mine] * rank_info.world_size
    dist.all_gather_object(all_samples, mine)
    mean_D, scale = _standardise(x_NVD.flatten(0, 1))
    row_S = np.full(len(source), -1)
    row_S[mine] = np.arange(len(mine))
    if device.type == "cuda" and 2 * x_NVD.nbytes < torch.cuda.mem_get_info(device)[0]:
        x_NVD = x_NVD.to(device)
    readable = np.sort(np.concatenate(all_samples))
    return CachedFeatures(x_NVD, row_S, source.labels, len(source.classes), readable, mean_D, scale, device)


def _allocate_features(shape: tuple[int, ...], rank_info: RankInfo, folder: Path) -> Tensor:
    """Return an fp32 tensor in host memory, or in a deleted file if it needs more than half of the memory left."""
    size = 4 * math.prod(shape)
    if 2 * size * rank_info.local_world_size < psutil.virtual_memory().available:
        return torch.empty(shape)
    log.warning("the features need %.3g GB and are kept in a file in %s", size / 1e9, folder)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the open file
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def _standardise(x_ND: Tensor) -> tuple[Tensor, float]:
    """Standardise rows in place and set the last column to 1. Return the mean and scale, which are of all ranks."""
    totals = torch.zeros(x_ND.shape[1], dtype=torch.float64)
    for rows in x_ND.split(_CHUNK):
        totals[:-1] += rows[:, :-1].double().sum(0)
        totals[-1] += len(rows)
    dist.all_reduce(totals)
    mean_D = (totals[:-1] / totals[-1]).float()
    squares = torch.zeros(1, dtype=torch.float64)
    for rows in x_ND.split(_CHUNK):
        rows[:, :-1] -= mean_D
        squares += rows[:, :-1].double().square().sum()
    dist.all_reduce(squares)
    scale = float((squares / totals[-1]).sqrt()) or 1.0
    for rows in x_ND.split(_CHUNK):
        rows[:, :-1] /= scale
        rows[:, -1] = 1
    return mean_D, scale


def rank_candidates(features: CachedFeatures, settings: Settings, seed: int) -> list[Candidate]:
    """Train a classifier for each learning rate and weight decay; return them by falling held-out accuracy."""
    labels = features.labels_S[features.readable]
    held_out = draw_balanced(labels, settings.holdout, seed)
    if not 0 < len(held_out) < len(labels):
        raise ValueError(
            f"fast.holdout: {settings.holdout:g} of {len(labels)} images leaves none to train on, or none to hold out"
        )
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    rates = [(lr, decay) for lr in settings.lrs for decay in settings.weight_decays]
    w_HCD = train_classifiers(features, features.readable[kept], rates, settings, seed)
    accuracies = _accuracies(features, features.readable[held_out], w_HCD)
    candidates = [Candidate(*pair, accuracy) for pair, accuracy in zip(rates, accuracies, strict=True)]
    return sorted(candidates, key=lambda candidate: -candidate.accuracy)  # stable: the first of equals comes first


def train_classifiers(
    features: CachedFeatures,
    samples: NDArray[np.int64],
    rates: list[tuple[float, float]],
    settings: Settings,
    seed: int,
) -> Tensor:
    """Train a classifier for each pair of rates, by SGD with momentum and a cosine schedule to zero. Collective.

    The batches are those of `data.order` over `samples` for any number of ranks; each rank computes the gradient of the
    images that it has features of. A classifier that diverges does not affect the others.

    Args:
        features: The features of the training images.
        samples: Indices of the images to train on, int64.
        rates: Learning rate and weight decay of each classifier.
        settings: Batch size, epochs and crops.
        seed: Seed of the order.

    Returns:
        The weights, fp32 [H, C, D].
    """
    device, crops = features.device, features.x_NVD.shape[1] - 1
    batch_size = min(settings.batch_size, len(samples))
    epoch_steps = steps_per_epoch(len(samples), batch_size)
    steps = epoch_steps * settings.epochs
    w_HCD = torch.zeros(len(rates), features.classes, features.x_NVD.shape[2], device=device)
    velocity_HCD = torch.zeros_like(w_HCD)
    lr_H11, decay_H11 = (torch.tensor(x, device=device)[:, None, None] for x in zip(*rates, strict=True))
    for step in range(steps):
        epoch, first = divmod(step, epoch_steps)
        order = samples_between(len(samples), seed, epoch, first * batch_size, (first + 1) * batch_size)
        x_BD, labels_B = _local_features(features, samples[order], 1 + epoch % crops if crops else 0)
        grad_BHC = (x_BD @ w_HCD.flatten(0, 1).T).view(len(x_BD), *w_HCD.shape[:2]).softmax(2)
        grad_BHC[torch.arange(len(x_BD), device=device), :, labels_B] -= 1
        grad_HCD = (grad_BHC.flatten(1).T @ x_BD).view_as(w_HCD) / batch_size
        if dist.get_world_size() > 1:
            dist.all_reduce(grad_HCD)
        velocity_HCD.mul_(MOMENTUM).add_(grad_HCD).addcmul_(decay_H11, w_HCD)
        w_HCD.addcmul_(lr_H11, velocity_HCD, value=-cosine(step, steps, 1.0, 0.0))
    return w_HCD


def to_linear_layer(w_CD: Tensor, features: CachedFeatures) -> dict[str, Tensor]:
    """Convert the weights of a classifier to weight and bias of a layer on features that are not standardised."""
    weight_CD, bias_C = w_CD[:, :-1] / features.scale, w_CD[:, -1]
    return {"weight": weight_CD, "bias": bias_C - weight_CD @ features.mean_D.to(w_CD.device)}


def _local_features(features: CachedFeatures, samples: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
    """Return the features [B, D] of a view, and the labels [B], of those of `samples` that this rank has."""
    rows = features.row_S[samples]
    labels_B = torch.from_numpy(features.labels_S[samples[rows >= 0]]).to(features.device)
    x_BD = features.x_NVD[torch.from_numpy(rows[rows >= 0]).to(features.x_NVD.device), view]
    return x_BD.to(features.device), labels_B


def _accuracies(features: CachedFeatures, samples: NDArray[np.int64], w_HCD: Tensor) -> list[float]:
    """Return the accuracy of each classifier on the central views of `samples`; a diverged one gets 0."""
    correct_H = torch.zeros(len(w_HCD), dtype=torch.int64, device=features.device)
    for chunk in np.split(samples, range(_CHUNK, len(samples), _CHUNK)):
        x_BD, labels_B = _local_features(features, chunk, 0)
        logits_BHC = (x_BD @ w_HCD.flatten(0, 1).T).view(len(x_BD), *w_HCD.shape[:2])
        correct_H += ((logits_BHC.argmax(2) == labels_B[:, None]) & logits_BHC.isfinite().all(2)).sum(0)
    dist.all_reduce(correct_H)
    return (correct_H / len(samples)).tolist()
