"""Looking at a run: what it will see, kNN of its newest checkpoint, and the report."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.sources.open import Source
from models.method import Method
from models.negatives.bank import Bank
from trainer import distributed
from trainer.build import build_method, weights
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.evaluate import knn
from trainer.evaluate.features import embed
from trainer.interop.weights import CheckpointChoice, load_encoder, to_device
from trainer.report.run import Gallery, Image, render
from trainer.run import checkpoint
from trainer.run.directory import read_config
from trainer.run.files import read_json, write_atomically
from trainer.run.metrics import set_up_logging
from trainer.run.results import read_rows
from trainer.run.sources import open_sources

# Of the report's galleries.
_QUERIES, _NEGATIVES, _NEIGHBOURS = 8, 12, 8
_MOST_IMAGES = 10_000  # of the training set that the galleries choose from


def evaluate_knn(run: Path, overrides: list[str], which: CheckpointChoice) -> None:
    """Print the kNN accuracy of a checkpoint, or of an imported model, as one JSON line.

    `overrides` are of data.*, eval.* and run.device. Raises ValueError if there is no run, no usable checkpoint, or no
    validation set.
    """
    config = read_config(run, overrides)
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        encoder, step = load_encoder(run, config, which)
        train, val = open_sources(config.data, run)
        if val is None:
            raise ValueError(f"{run}: kNN needs labelled images to test on; give data.val=…")
        accuracy = knn.evaluate(to_device(encoder, rank_info.device), train, val, rank_info.device, config)
        if rank_info.rank == 0:
            print(
                json.dumps({"knn": accuracy, "k": config.eval.k, "temperature": config.eval.temperature, "step": step})
            )


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path. Galleries only where there is a checkpoint.

    Raises ValueError if there is no run.
    """
    config = read_config(run)
    neighbours: list[Gallery] = []
    negatives: list[Gallery] = []
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        if any((run / "checkpoints").glob("step-*")):
            method, _ = load_method(config, rank_info, run)
            train, val = open_sources(config.data, run)
            chosen = _spread(len(train), _MOST_IMAGES)
            if val:
                neighbours = find_neighbours(method, config, rank_info, train, val, chosen)
            if method.bank:
                negatives = find_negatives(method, method.bank, config, rank_info, train, chosen)
    html = render(
        run, config.model_dump(mode="json"), read_rows(run / "metrics.jsonl"), read_json(run / "results.json"),
        neighbours, negatives,
    )  # fmt: skip
    write_atomically(run / "report.html", html)
    return run / "report.html"


def load_method(config: Config, rank_info: RankInfo, run: Path) -> tuple[Method, int]:
    """The game of the newest good checkpoint, and its step. Raises ValueError if there is none."""
    method = build_method(config, rank_info)
    path = checkpoint.newest(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} has no usable checkpoint")
    checkpoint.load(path, weights(method))
    method.loaded()
    return method, checkpoint.step_of(path)


def find_neighbours(
    method: Method, config: Config, rank_info: RankInfo, train: Source, val: Source, chosen: NDArray[np.int64]
) -> list[Gallery]:
    """Test images with the training images whose backbone features are nearest."""
    queries = embed(method.student, val, _spread(len(val), _QUERIES), rank_info.device, config)
    images = embed(method.student, train, chosen, rank_info.device, config)
    galleries = []
    for x_D, sample in zip(queries.x_ND, queries.samples_N.tolist(), strict=True):
        title = val.classes[val.labels[sample]]
        galleries.append(_gallery(title, val.image(sample), images.x_ND @ x_D, images.samples_N, train))
    return galleries


def find_negatives(
    method: Method, bank: Bank, config: Config, rank_info: RankInfo, train: Source, chosen: NDArray[np.int64]
) -> list[Gallery]:
    """Negatives of the bank with the training images whose embeddings are nearest."""
    images = embed(method.student, train, chosen, rank_info.device, config, head=True)
    return [
        _gallery(f"negative {k}", None, images.x_ND @ bank.n_KD[k], images.samples_N, train)
        for k in _spread(len(bank.n_KD), _NEGATIVES).tolist()
    ]


def _gallery(title: str, query: Image | None, similarity_N: Tensor, samples_N: Tensor, source: Source) -> Gallery:
    best, places = similarity_N.float().topk(min(_NEIGHBOURS, len(similarity_N)))
    images, captions = [], []
    for similarity, sample in zip(best.tolist(), samples_N[places.cpu()].tolist(), strict=True):
        images.append(source.image(sample))
        captions.append(f"{source.classes[source.labels[sample]]} {similarity:.3f}")
    return Gallery(title, query, images, captions)


def _spread(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` numbers below n, evenly spaced: folders list their images class by class."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
