"""Galleries of the report: training images that are nearest to validation images, and to learned negatives."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.sources.base import Source
from models.encoder import Encoder
from trainer.build import build_method
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.evaluate.features import embed
from trainer.interop.weights import find_weights, read_encoder
from trainer.report.page import Image, thumbnail
from trainer.run import checkpoint

MAX_QUERIES, MAX_NEGATIVES = 8, 12  # galleries of each kind
NEAREST = 8  # images in a gallery
MAX_IMAGES = 10_000  # of the training set, from which the nearest are chosen


@dataclass(frozen=True)
class Gallery:
    """A row of images with one caption each, after the query image if there is one."""

    title: str
    query: Image | None
    images: list[Image]
    captions: list[str]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(
                f"gallery {self.title!r} has {len(self.images)} images and {len(self.captions)} captions: "
                "one caption per image is needed"
            )


def draw_galleries(
    run: Path, config: Config, rank_info: RankInfo, train: Source, val: Source | None
) -> tuple[list[Gallery], list[Gallery]]:
    """Returns the galleries of a run's newest checkpoint: nearest to validation images, and nearest to negatives.

    The first list is empty without validation images, the second one for a method without learned negatives.

    Raises:
        ValueError: There is no undamaged checkpoint, or the newest one cannot be read.
    """
    weights, _ = find_weights(run)
    method = build_method(config, rank_info, read_encoder(weights, config))
    chosen = _spread(len(train), MAX_IMAGES)
    neighbours = find_neighbours(method.student, config, rank_info, train, val, chosen) if val else []
    negatives: list[Gallery] = []
    if method.negatives and method.negatives.learned:
        checkpoint.load(weights.parent, method.state_dict())
        method.loaded()
        negatives = find_negatives(method.student, method.negatives.n_KD, config, rank_info, train, chosen)
    return neighbours, negatives


def find_neighbours(
    student: Encoder, config: Config, rank_info: RankInfo, train: Source, val: Source, chosen: NDArray[np.int64]
) -> list[Gallery]:
    """Returns validation images with those of the `chosen` training images whose backbone features are nearest."""
    queries = embed(student.backbone, val, _spread(len(val), MAX_QUERIES), rank_info.device, config)
    images = embed(student.backbone, train, chosen, rank_info.device, config)
    return [
        _nearest(val.classes[val.labels[i]], thumbnail(val.image(i)), images.x_ND @ x_D, images.samples_N, train)
        for x_D, i in zip(queries.x_ND, queries.samples_N.tolist(), strict=True)
    ]


def find_negatives(
    student: Encoder, n_KD: Tensor, config: Config, rank_info: RankInfo, train: Source, chosen: NDArray[np.int64]
) -> list[Gallery]:
    """Returns some of the negatives, unit rows [K, D], with the `chosen` training images of nearest embeddings."""
    images = embed(student, train, chosen, rank_info.device, config)
    return [
        _nearest(f"negative {k}", None, images.x_ND @ n_KD[k].float(), images.samples_N, train)
        for k in _spread(len(n_KD), MAX_NEGATIVES).tolist()
    ]


def _nearest(title: str, query: Image | None, similarity_N: Tensor, samples_N: Tensor, source: Source) -> Gallery:
    best, positions = similarity_N.float().topk(min(NEAREST, len(similarity_N)))
    images, captions = [], []
    for similarity, i in zip(best.tolist(), samples_N[positions.cpu()].tolist(), strict=True):
        images.append(thumbnail(source.image(i)))  # a report has over a hundred images, and each may be a photograph
        captions.append(f"{source.classes[source.labels[i]]} {similarity:.3f}")
    return Gallery(title, query, images, captions)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Returns at most `most` indices below `count`, evenly spaced, since folders list their images class by class."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
