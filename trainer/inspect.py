"""Looking at a run: kNN of its newest checkpoint, and the report."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.index import Source
from models.bank import Bank
from models.method import Method
from trainer import checkpoint, distributed
from trainer.build import make_game, weights
from trainer.config import Config
from trainer.distributed import Place
from trainer.evaluate import knn
from trainer.evaluate.encoder import load_encoder
from trainer.evaluate.features import embed
from trainer.metrics import set_up_logging
from trainer.report import Gallery, Image, render
from trainer.run_dir import open_sources, read_config, read_json, read_rows, write_atomically

# Of the report's galleries.
_QUERIES, _NEGATIVES, _NEIGHBOURS = 8, 12, 8
_MOST_IMAGES = 10_000  # of the training set that the galleries choose from


def evaluate_knn(run: Path, overrides: list[str]) -> None:
    """Print the kNN accuracy of the newest checkpoint as one JSON line. `overrides` are of eval.* and run.device.

    Raises ValueError if there is no run, no usable checkpoint, or no validation set.
    """
    config = read_config(run, overrides)
    with distributed.started(config.run.device) as place:
        set_up_logging(place.rank)
        encoder, _, step = load_encoder(run, config, place)
        train, val = open_sources(config, run)
        if val is None:
            raise ValueError(f"{run}: kNN needs labelled images to test on; give data.val=…")
        accuracy = knn.evaluate(encoder, train, val, place.device, config)
        if place.rank == 0:
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
    with distributed.started(config.run.device) as place:
        set_up_logging(place.rank)
        if any((run / "checkpoints").glob("step-*")):
            game, _ = load_game(config, place, run)
            train, val = open_sources(config, run)
            chosen = _spread(len(train), _MOST_IMAGES)
            if val:
                neighbours = find_neighbours(game, config, place, train, val, chosen)
            if game.bank:
                negatives = find_negatives(game, game.bank, config, place, train, chosen)
    html = render(
        run, config.model_dump(mode="json"), read_rows(run / "metrics.jsonl"), read_json(run / "results.json"),
        neighbours, negatives,
    )  # fmt: skip
    write_atomically(run / "report.html", html)
    return run / "report.html"


def load_game(config: Config, place: Place, run: Path) -> tuple[Method, int]:
    """The game of the newest good checkpoint, and its step. Raises ValueError if there is none."""
    game = make_game(config, place)
    path = checkpoint.newest(run / "checkpoints")
    if path is None:
        raise ValueError(f"{run} has no usable checkpoint")
    checkpoint.load(path, weights(game))
    game.loaded()
    return game, checkpoint.step_of(path)


def find_neighbours(
    game: Method, config: Config, place: Place, train: Source, val: Source, chosen: NDArray[np.int64]
) -> list[Gallery]:
    """Test images with the training images whose backbone features are nearest."""
    queries = embed(game.student, val, _spread(len(val), _QUERIES), place.device, config)
    images = embed(game.student, train, chosen, place.device, config)
    galleries = []
    for x_D, sample in zip(queries.x_ND, queries.samples_N.tolist(), strict=True):
        title = val.classes[val.labels[sample]]
        galleries.append(_gallery(title, val.image(sample), images.x_ND @ x_D, images.samples_N, train))
    return galleries


def find_negatives(
    game: Method, bank: Bank, config: Config, place: Place, train: Source, chosen: NDArray[np.int64]
) -> list[Gallery]:
    """Negatives of the bank with the training images whose embeddings are nearest."""
    images = embed(game.student, train, chosen, place.device, config, head=True)
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
