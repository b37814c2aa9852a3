"""Linear evaluation: how well a linear classifier tells the classes by the features of the frozen backbone.

The protocol is that of AdCo's published code (https://github.com/maple-research-lab/AdCo, lincls.py, from MoCo's): the
backbone in evaluation mode, its features after global average pooling as they are (they are not normalised), one linear
layer, weights of N(0, 0.01²); SGD with momentum 0.9, learning rate 10 for batches of 256, after each epoch along half a
cosine to 0.01, no weight decay, 100 epochs; random resized crops of 8 to 100 % of the area and flips on the training
images, the central crop on the test images. MoCo's own is linear.lr=30 with steps. They report the best epoch on the
validation images; this one the last. Learning rates are for features of such a length: another backbone, or another
method, may need another, which the fast protocol (see `trainer.evaluate.heads`) finds without the test images.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from data.index import Source
from trainer import distributed
from trainer.config import Config
from trainer.distributed import Place
from trainer.evaluate import heads
from trainer.evaluate.classifier import Classifier, Recipe, fit, score
from trainer.evaluate.encoder import Pretrained, load_encoder
from trainer.evaluate.folder import RESULTS, fingerprint, machine, opened
from trainer.metrics import set_up_logging
from trainer.optim import cosine
from trainer.run_dir import open_sources, read_config, read_json, write_json

log = logging.getLogger(__name__)


def evaluate(run: Path, overrides: list[str], name: str | None) -> None:
    """Evaluate a run's newest checkpoint into RUN/NAME, and print the result as one JSON line.

    Goes on where it was stopped; what is finished is only printed. Raises ValueError if there is no run, no usable
    checkpoint or no validation set, and `trainer.stop.Stopped` where it was asked to end early.
    """
    started = time.time()
    config = read_config(run, overrides)
    linear = config.linear
    with distributed.started(config.run.device) as place:
        set_up_logging(place.rank)
        pretrained = load_encoder(run, config, place)
        before = fingerprint(pretrained.encoder.backbone)
        settings = {
            **common(config, before),
            **(
                {"fast": config.fast.model_dump(), "seed": linear.seed}
                if linear.fast
                else linear.model_dump(exclude={"save_every"})
            ),
        }
        with opened(run, name or ("linear-fast" if linear.fast else "linear"), settings, place) as folder:
            if not (folder / RESULTS).exists():
                train, test = labelled_sources(config, folder)
                evaluation = _fast if linear.fast else _full
                result = evaluation(pretrained, train, test, config, place, folder, started)
                if fingerprint(pretrained.encoder.backbone) != before:
                    raise RuntimeError(
                        "the backbone has changed during linear evaluation: the result would mean nothing"
                    )
                if place.rank == 0:
                    write_json(folder / RESULTS, {**about(pretrained, train), **result, **machine(place)})
            if place.rank == 0:
                print(json.dumps(read_json(folder / RESULTS)))


def common(config: Config, checksum: str) -> dict[str, Any]:
    """What every evaluation's result depends on."""
    size = config.eval.size or config.data.views[0].size
    return {
        "backbone": checksum,
        "train": config.data.train,
        "val": config.data.val,
        "size": size,
        "precision": config.run.precision,
    }


def about(pretrained: Pretrained, train: Source) -> dict[str, Any]:
    """What every result has: whose it is."""
    return {"weights": str(pretrained.path), "step": pretrained.step, "classes": len(train.classes)}


def labelled_sources(config: Config, folder: Path) -> tuple[Source, Source]:
    """Training and validation images. Raises ValueError if there are none of the latter, or no classes."""
    train, test = open_sources(config, folder)
    if test is None:
        raise ValueError("an evaluation needs labelled images to test on; give data.val=…")
    if len(train.classes) < 2:
        raise ValueError(f"an evaluation needs labels, and {config.data.train} has one class, {train.classes[0]}")
    return train, test


def _full(
    pretrained: Pretrained, train: Source, test: Source, config: Config, place: Place, folder: Path, started: float
) -> dict[str, Any]:
    linear = config.linear
    network = Classifier(pretrained.encoder, len(train.classes), frozen=True, seed=linear.seed)
    optimizer = torch.optim.SGD(
        network.head.parameters(), lr=linear.lr, momentum=linear.momentum, weight_decay=linear.weight_decay
    )
    epoch_steps = len(train) // linear.batch_size

    def lr(step: int) -> float:
        return cosine(step // epoch_steps, linear.epochs, linear.lr, linear.lr_final)

    recipe = Recipe(linear.batch_size, linear.epochs, lr, linear.scale, linear.seed, linear.save_every)
    seconds = fit(network, optimizer, train, recipe, config, place, folder, started)
    result = score(network, test, train.classes, place, config)
    return {**result._asdict(), "protocol": "linear", "lr": linear.lr, "epochs": linear.epochs, "seconds": seconds}


def _fast(
    pretrained: Pretrained, train: Source, test: Source, config: Config, place: Place, folder: Path, started: float
) -> dict[str, Any]:
    fast, seed = config.fast, config.linear.seed
    began = time.monotonic()
    network = Classifier(pretrained.encoder, len(train.classes), frozen=True, seed=seed)
    features = heads.cache(pretrained.encoder, train, place, config, folder)
    log.info("features of %d images after %.0f s", len(features.readable), time.monotonic() - began)
    choices = heads.select(features, train, fast, seed, place)
    best = choices[0]
    for choice in choices[:3]:
        log.info("held out: %.4f with lr %g, weight decay %g", choice.accuracy, choice.lr, choice.weight_decay)
    w_HCD = heads.train(features, train, features.readable, [(best.lr, best.weight_decay)], fast, seed, place)
    network.head.load_state_dict(heads.as_layer(w_HCD[0], features))
    seconds = time.monotonic() - began
    result = score(network, test, train.classes, place, config)
    return {
        **result._asdict(),
        "protocol": "fast linear",
        "lr": best.lr,
        "weight_decay": best.weight_decay,
        "lr_of_protocol": best.lr / features.scale**2,
        "held_out": best.accuracy,
        "epochs": fast.epochs,
        "seconds": seconds,
        "choices": [choice._asdict() for choice in choices],
    }
