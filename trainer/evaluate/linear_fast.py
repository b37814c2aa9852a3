"""Fast linear evaluation: features of the training images a few times, then many linear classifiers trained together.

Each learning rate with each weight decay is a classifier; all of them see the same batches, so that a step is two
matrix products. They learn from some random crops of each image, one after another, as the full protocol from ever new
ones. The best by the central views of held-out training images is trained again on all of them.

Features are moved and scaled by the same numbers for all images (mean 0, average squared length 1), so that one range
of learning rates suits every backbone; a linear classifier of these is one of the features as they are.

N images of a rank, V views of each, H classifiers, B images of a batch, C classes, D features, the last always 1.
"""

import logging
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from data.batch import Crops
from data.order import samples_between, steps_per_epoch
from data.sources.base import Source
from data.sources.subset import draw_balanced
from data.views import Augment, View
from models.encoder import Encoder
from trainer.config import Fast
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.engines.optim import cosine
from trainer.evaluate.base import EvaluationContext
from trainer.evaluate.features import forward_images
from trainer.evaluate.probe import MOMENTUM

log = logging.getLogger(__name__)

_CHUNK = 4096  # rows that are looked at together


class Cache(NamedTuple):
    """This rank's part of the features.

    x_NVD: float32, standardised, the last column 1; on the device or in host memory. View 0 is the central one.
    place_S: int64, for each sample of the source its row, -1 if it is another rank's or cannot be read. readable:
    samples of all ranks, sorted. mean_D and scale: what took the features' mean away and their length to 1 (without the
    last column).
    """

    x_NVD: Tensor
    place_S: NDArray[np.int64]
    readable: NDArray[np.int64]
    mean_D: Tensor
    scale: float


class Choice(NamedTuple):
    """A learning rate and a weight decay, for standardised features, and its accuracy on the held-out images."""

    lr: float
    weight_decay: float
    accuracy: float


def cache(encoder: Encoder, source: Source, context: EvaluationContext) -> Cache:
    """The features of every R-th sample: of its central view, and fast.crops random ones; called by all ranks.

    In host memory, or in a file in `folder` that goes with the process if they are more than half of what is free; on a
    GPU if they take less than half of what is free there. Raises ValueError, on all ranks, if one can read nothing.
    """
    rank_info, config, inner = context.rank_info, context.config, encoder.head[0]
    assert isinstance(inner, nn.Linear)
    view = View(size=config.eval.size or config.data.views[0].size, scale=config.linear.scale)
    augment = Augment(jitter=0, gray=0, blur=0)
    mine = np.arange(rank_info.rank, len(source), rank_info.world_size)
    x_NVD = _allocate_features((len(mine), config.fast.crops + 1, inner.in_features + 1), rank_info, context.folder)
    for v in range(config.fast.crops + 1):
        crops = Crops(view, augment, config.linear.seed, v - 1) if v else None
        shown: list[Tensor] = []
        filled = 0
        for x_BD, numbers in forward_images(encoder, encoder.backbone, source, mine, rank_info.device, config, crops):
            x_NVD[filled : filled + len(numbers), v, :-1] = x_BD.cpu()
            filled += len(numbers)
            shown.append(numbers)
        raise_on_all_ranks(None if filled else f"data.train: none of {len(mine)} images can be read")
        if not v:
            mine = torch.cat(shown).numpy()
        raise_on_all_ranks(None if filled == len(mine) else "data.train: images can be read now and not then")
    x_NVD = x_NVD[: len(mine)]
    everyones: list[NDArray[np.int64]] = [mine] * rank_info.world_size
    dist.all_gather_object(everyones, mine)
    mean_D, scale = _standardise(x_NVD.flatten(0, 1))
    place_S = np.full(len(source), -1)
    place_S[mine] = np.arange(len(mine))
    if rank_info.device.type == "cuda" and 2 * x_NVD.nbytes < torch.cuda.mem_get_info(rank_info.device)[0]:
        x_NVD = x_NVD.to(rank_info.device)
    return Cache(x_NVD, place_S, np.sort(np.concatenate(everyones)), mean_D, scale)


def _allocate_features(shape: tuple[int, ...], rank_info: RankInfo, folder: Path) -> Tensor:
    """float32 in host memory, or mapped from a file without a name."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = 4 * math.prod(shape)
    if 2 * size * rank_info.local_world_size < free:
        return torch.empty(shape)
    log.warning("features take %.3g GB and are kept in a file in %s", size / 1e9, folder)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping stays when it is closed
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def _standardise(x_ND: Tensor) -> tuple[Tensor, float]:
    """In place, by all ranks' mean and average squared length, which it gives back; the last column becomes 1."""
    totals = torch.zeros(x_ND.shape[1], dtype=torch.float64)
    for part in x_ND.split(_CHUNK):
        totals[:-1] += part[:, :-1].double().sum(0)
        totals[-1] += len(part)
    dist.all_reduce(totals)
    mean_D = (totals[:-1] / totals[-1]).float()
    squares = torch.zeros(1, dtype=torch.float64)
    for part in x_ND.split(_CHUNK):
        part[:, :-1] -= mean_D
        squares += part[:, :-1].double().square().sum()
    dist.all_reduce(squares)
    scale = float((squares / totals[-1]).sqrt()) or 1.0
    for part in x_ND.split(_CHUNK):
        part[:, :-1] /= scale
        part[:, -1] = 1
    return mean_D, scale


def select(features: Cache, source: Source, fast: Fast, seed: int, rank_info: RankInfo) -> list[Choice]:
    """Every learning rate with every weight decay, trained on a part and tried on the held-out rest; best first."""
    labels = source.labels[features.readable]
    held_out = draw_balanced(labels, fast.holdout, seed)
    if not 0 < len(held_out) < len(labels):
        raise ValueError(f"fast.holdout: {fast.holdout:g} of {len(labels)} images leaves none for one of two parts")
    rest = features.readable[np.setdiff1d(np.arange(len(labels)), held_out)]
    pairs = [(lr, decay) for lr in fast.lrs for decay in fast.weight_decays]
    w_HCD = train(features, source, rest, pairs, fast, seed, rank_info)
    accuracies = _accuracies(features, source, features.readable[held_out], w_HCD, rank_info)
    choices = [Choice(lr, decay, accuracy) for (lr, decay), accuracy in zip(pairs, accuracies, strict=True)]
    return sorted(choices, key=lambda choice: -choice.accuracy)  # stable: of equals the first


def train(
    features: Cache,
    source: Source,
    samples: NDArray[np.int64],
    pairs: list[tuple[float, float]],
    fast: Fast,
    seed: int,
    rank_info: RankInfo,
) -> Tensor:
    """Classifiers [H, C, D] of these learning rates and weight decays, by SGD with momentum, cosine to zero.

    The batches are those of `data.order` over `samples`, whatever the number of ranks: each computes what it has the
    features of. One that diverges does not disturb the others.
    """
    device, classes, crops = rank_info.device, len(source.classes), features.x_NVD.shape[1] - 1
    batch_size = min(fast.batch_size, len(samples))
    epoch_steps = steps_per_epoch(len(samples), batch_size)
    steps = epoch_steps * fast.epochs
    w_HCD = torch.zeros(len(pairs), classes, features.x_NVD.shape[2], device=device)
    velocity_HCD = torch.zeros_like(w_HCD)
    lr_H11, decay_H11 = (torch.tensor(x, device=device)[:, None, None] for x in zip(*pairs, strict=True))
    for step in range(steps):
        epoch, first = divmod(step, epoch_steps)
        order = samples_between(len(samples), seed, epoch, first * batch_size, (first + 1) * batch_size)
        x_BD, labels_B = _rows(features, source, samples[order], device, 1 + epoch % crops if crops else 0)
        grad_BHC = (x_BD @ w_HCD.flatten(0, 1).T).view(len(x_BD), *w_HCD.shape[:2]).softmax(2)
        grad_BHC[torch.arange(len(x_BD), device=device), :, labels_B] -= 1
        grad_HCD = (grad_BHC.flatten(1).T @ x_BD).view_as(w_HCD) / batch_size
        if rank_info.world_size > 1:
            dist.all_reduce(grad_HCD)
        velocity_HCD.mul_(MOMENTUM).add_(grad_HCD).addcmul_(decay_H11, w_HCD)
        w_HCD.addcmul_(lr_H11, velocity_HCD, value=-cosine(step, steps, 1.0, 0.0))
    return w_HCD


def as_layer(w_CD: Tensor, features: Cache) -> dict[str, Tensor]:
    """Weight and bias for features as the backbone gives them."""
    weight_CD, bias_C = w_CD[:, :-1] / features.scale, w_CD[:, -1]
    return {"weight": weight_CD, "bias": bias_C - weight_CD @ features.mean_D.to(w_CD.device)}


def _rows(
    features: Cache, source: Source, samples: NDArray[np.int64], device: torch.device, view: int
) -> tuple[Tensor, Tensor]:
    """Features of a view, and labels, of those of `samples` that this rank has."""
    rows = features.place_S[samples]
    labels_B = torch.from_numpy(source.labels[samples[rows >= 0]]).to(device)
    x_BD = features.x_NVD[torch.from_numpy(rows[rows >= 0]).to(features.x_NVD.device), view]
    return x_BD.to(device), labels_B


def _accuracies(
    features: Cache, source: Source, samples: NDArray[np.int64], w_HCD: Tensor, rank_info: RankInfo
) -> list[float]:
    right_H = torch.zeros(len(w_HCD), dtype=torch.int64, device=rank_info.device)
    for part in np.split(samples, range(_CHUNK, len(samples), _CHUNK)):
        x_BD, labels_B = _rows(features, source, part, rank_info.device, 0)
        logits_BHC = (x_BD @ w_HCD.flatten(0, 1).T).view(len(x_BD), *w_HCD.shape[:2])
        right_H += ((logits_BHC.argmax(2) == labels_B[:, None]) & logits_BHC.isfinite().all(2)).sum(0)
    dist.all_reduce(right_H)
    return (right_H / len(samples)).tolist()
