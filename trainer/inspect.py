"""Looking at a run: what it will see, kNN of its newest checkpoint, and the report."""

import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.cpu import render_center
from data.index import Source, open_source
from data.loader import train_batches
from models.bank import Bank
from models.method import Method
from trainer import checkpoint, distributed
from trainer.build import data_backend, make_game, weights
from trainer.config import Config
from trainer.distributed import Place
from trainer.evaluate import knn
from trainer.evaluate.features import embed
from trainer.metrics import set_up_logging
from trainer.report import Gallery, Image, render
from trainer.run_dir import open_sources, read_config, read_json, read_rows, write_atomically
from trainer.weights import Which, load_encoder, to_device

# Of the report's galleries.
_QUERIES, _NEGATIVES, _NEIGHBOURS = 8, 12, 8
_MOST_IMAGES = 10_000  # of the training set that the galleries choose from


def draw_views(config: Config, out: Path, samples: int) -> None:
    """A PNG with a row for each of the first `samples` images of the first epoch: the image, then its views.

    As data.backend makes them. Raises ValueError if `out` exists, or the images cannot be read.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, nothing is overwritten")
    data, seed = config.data, config.run.seed
    source = open_source(data.train)
    with distributed.started(config.run.device) as place:
        batches = train_batches(
            source, list(data.views), data.augment, seed, samples, 0, 1, 0, 1, 0, place.device,
            data_backend(config, place.device), data.prefetch, data.decoder, data.blocks,
        )  # fmt: skip
        batch = next(batches)
        views = [view.cpu().numpy() for view in batch.views]
    side = max(view.size for view in data.views)
    whole = np.stack([render_center(source.image(i), side) for i in batch.samples.tolist()])
    cells = [
        np.pad(x, ((0, 0), (0, side + 2 - x.shape[1]), (0, side + 2 - x.shape[2]), (0, 0))) for x in (whole, *views)
    ]
    picture = np.concatenate(list(np.concatenate(cells, axis=2)))
    out.write_bytes(cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes())


def evaluate_knn(run: Path, overrides: list[str], which: Which) -> None:
    """Print the kNN accuracy of a checkpoint, or of an imported model, as one JSON line.

    `overrides` are of data.*, eval.* and run.device. Raises ValueError if there is no run, no usable checkpoint, or no
    validation set.
    """
    config = read_config(run, overrides)
    with distributed.started(config.run.device) as place:
        set_up_logging(place.rank)
        encoder, step = load_encoder(run, config, which)
        train, val = open_sources(config.data, run)
        if val is None:
            raise ValueError(f"{run}: kNN needs labelled images to test on; give data.val=…")
        accuracy = knn.evaluate(to_device(encoder, place.device), train, val, place.device, config)
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
            train, val = open_sources(config.data, run)
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
