"""Linear evaluation: how well a linear classifier tells the classes by the features of the frozen backbone.

The protocol is that of AdCo's published code (https://github.com/maple-research-lab/AdCo, lincls.py, from MoCo's): the
backbone in evaluation mode, its features after global average pooling as they are (they are not normalised), one linear
layer, weights of N(0, 0.01²); SGD with momentum 0.9, learning rate 10 for batches of 256, after each epoch along half a
cosine to 0.01, no weight decay, 100 epochs; random resized crops of 8 to 100 % of the area and flips on the training
images, the central crop on the test images. MoCo's own is linear.lr=30 with steps. They report the best epoch on the
validation images; this one the last. Learning rates are for features of such a length: another backbone, or another
method, may need another, which the fast protocol (see `trainer.evaluate.linear_fast`) finds without the test images.
"""

import logging
import time
from typing import Any

import torch

from trainer.config import Config
from trainer.engines.optim import cosine
from trainer.evaluate import linear_fast as heads
from trainer.evaluate.base import EvaluationContext, Evaluator, Results, labelled_sources
from trainer.evaluate.probe import MOMENTUM, Classifier, Recipe, fit, score

log = logging.getLogger(__name__)


def _settings(config: Config) -> dict[str, Any]:
    linear = config.linear
    recipe: dict[str, Any] = {"fast": config.fast.model_dump(), "seed": linear.seed, "scale": linear.scale}
    if not linear.fast:
        recipe = linear.model_dump(exclude={"save_every"})
    return {"train": config.data.train, "val": config.data.val, **recipe}


def _evaluate(context: EvaluationContext) -> Results:
    return _fast(context) if context.config.linear.fast else _full(context)


EVALUATOR = Evaluator(lambda config, trained: "linear-fast" if config.linear.fast else "linear", _settings, _evaluate)


def _full(context: EvaluationContext) -> Results:
    train, test = labelled_sources(context)
    linear = context.config.linear
    network = Classifier(context.encoder, len(train.classes), frozen=True, seed=linear.seed)
    optimizer = torch.optim.SGD(
        network.head.parameters(), lr=linear.lr, momentum=MOMENTUM, weight_decay=linear.weight_decay
    )
    epoch_steps = len(train) // linear.batch_size

    def lr(step: int) -> float:
        return cosine(step // epoch_steps, linear.epochs, linear.lr, linear.lr_final)

    recipe = Recipe(linear.batch_size, linear.epochs, lr, linear.scale, linear.seed, linear.save_every)
    seconds = fit(network, optimizer, train, recipe, context, context.folder)
    return {
        **score(network, test, train.classes, context)._asdict(),
        "classes": len(train.classes),
        "protocol": "linear",
        "lr": linear.lr,
        "epochs": linear.epochs,
        "seconds": seconds,
    }


def _fast(context: EvaluationContext) -> Results:
    """The test images are seen once, by the chosen classifier."""
    train, test = labelled_sources(context)
    fast, seed = context.config.fast, context.config.linear.seed
    began = time.monotonic()
    network = Classifier(context.encoder, len(train.classes), frozen=True, seed=seed)
    features = heads.cache(context.encoder, train, context)
    log.info("features of %d images after %.0f s", len(features.readable), time.monotonic() - began)
    choices = heads.select(features, train, fast, seed, context.rank_info)
    best = choices[0]
    for choice in choices[:3]:
        log.info("held out: %.4f with lr %g, weight decay %g", choice.accuracy, choice.lr, choice.weight_decay)
    pair = [(best.lr, best.weight_decay)]
    w_HCD = heads.train(features, train, features.readable, pair, fast, seed, context.rank_info)
    network.head.load_state_dict(heads.as_layer(w_HCD[0], features))
    seconds = time.monotonic() - began
    return {
        **score(network, test, train.classes, context)._asdict(),
        "classes": len(train.classes),
        "protocol": "fast linear",
        "lr": best.lr,
        "weight_decay": best.weight_decay,
        # For features of their own length, and the protocol's batches.
        "lr_of_protocol": best.lr / features.scale**2 * context.config.linear.batch_size / fast.batch_size,
        "held_out": best.accuracy,
        "epochs": fast.epochs,
        "seconds": seconds,
        "choices": [choice._asdict() for choice in choices],
    }
