"""Linear evaluation: accuracy of a linear classifier on the features of the frozen backbone.

The protocol is that of AdCo's published code (https://github.com/maple-research-lab/AdCo, lincls.py, after MoCo's). The
backbone is in evaluation mode; its features after global average pooling are not normalised. One linear layer starts
from N(0, 0.01²) and is trained by SGD with momentum 0.9 and without weight decay for 100 epochs. The learning rate for
batches of 256 is 10 and falls after each epoch along half a cosine to 0.01. Training images are random resized crops of
8 to 100 % of the area, flipped at random; test images are central crops. MoCo uses learning rate 30 with step decay.

The published results are those of the best epoch on the validation images; this evaluation reports the last epoch. The
best learning rate depends on the length of the features, hence on backbone and method. The fast protocol
(`trainer.evaluate.linear_fast`) finds one without the test images.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.engines.optim import Sgd, cosine
from trainer.evaluate import linear_fast
from trainer.evaluate.base import EvaluationContext, Evaluator, Results, labelled_sources
from trainer.evaluate.probe import MOMENTUM, Classifier, CropScale, score
from trainer.schema import Section

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)


class Settings(Section):
    """Linear evaluation."""

    lr: float = Field(10.0, gt=0, description="Learning rate; it is not scaled with the batch size.")
    lr_final: float = Field(0.01, ge=0, description="Learning rate at the end of the cosine schedule.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    batch_size: int = Field(256, ge=1, description="Batch size over all ranks.")
    epochs: int = Field(100, ge=1, description="Number of epochs.")
    scale: CropScale = Field((0.08, 1.0), description="Area of the random crops, as a share of the image's area.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the initial weights, the order and the crops.")
    save_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    fast: bool = Field(False, description="Use the fast protocol (section fast) instead of the published one.")


def _folder_name(config: "Config", trained: "Config") -> str:
    return "linear-fast" if config.linear.fast else "linear"


def _settings(config: "Config") -> dict[str, Any]:
    linear = config.linear
    if linear.fast:
        protocol: dict[str, Any] = {"fast": config.fast.model_dump(), "seed": linear.seed, "scale": linear.scale}
    else:
        protocol = linear.model_dump(exclude={"save_every"})
    return protocol


def _evaluate(context: EvaluationContext) -> Results:
    if not context.config.linear.fast:
        return _evaluate_published(context)
    with context.interruptible():
        return _evaluate_fast(context)


EVALUATOR = Evaluator(_folder_name, _settings, _evaluate, labelled_sources)


def _evaluate_published(context: EvaluationContext) -> Results:
    from trainer.evaluate.fit import Recipe, fit

    train, test = context.sources["train"], context.sources["val"]
    linear = context.config.linear
    network = Classifier(context.encoder, len(train.classes), frozen=True, seed=linear.seed)
    optimizer = Sgd(network.head.parameters(), lr=linear.lr, momentum=MOMENTUM, weight_decay=linear.weight_decay)
    epoch_steps = len(train) // linear.batch_size

    def lr(step: int) -> float:
        return cosine(step // epoch_steps, linear.epochs, linear.lr, linear.lr_final)

    recipe = Recipe(linear.batch_size, linear.epochs, lr, linear.scale, linear.seed, linear.save_every)
    seconds = fit(network, optimizer, train, recipe, context, context.folder)
    with context.interruptible():
        scores = score(network, test, train.classes, context)
    return {
        **scores._asdict(),
        "classes": len(train.classes),
        "protocol": "linear",
        "lr": linear.lr,
        "epochs": linear.epochs,
        "seconds": seconds,
    }


def _evaluate_fast(context: EvaluationContext) -> Results:
    """Only the chosen classifier is evaluated on the test images, once."""
    train, test = context.sources["train"], context.sources["val"]
    fast, seed = context.config.fast, context.config.linear.seed
    start = time.monotonic()
    network = Classifier(context.encoder, len(train.classes), frozen=True, seed=seed)
    features = linear_fast.cache_features(train, context)
    log.info("features of %d images after %.0f s", len(features.readable), time.monotonic() - start)
    candidates = linear_fast.rank_candidates(features, fast, seed)
    best = candidates[0]
    for candidate in candidates[:3]:
        log.info("held-out accuracy %.4f with lr %g, weight decay %g", candidate.accuracy, *candidate[:2])
    w_HCD = linear_fast.train_classifiers(features, features.readable, [(best.lr, best.weight_decay)], fast, seed)
    network.head.load_state_dict(linear_fast.to_linear_layer(w_HCD[0], features))
    seconds = time.monotonic() - start
    return {
        **score(network, test, train.classes, context)._asdict(),
        "classes": len(train.classes),
        "protocol": "fast linear",
        "lr": best.lr,
        "weight_decay": best.weight_decay,
        # The equivalent learning rate of the published protocol: for features that are not scaled, and its batch size.
        "lr_of_protocol": best.lr / features.scale**2 * context.config.linear.batch_size / fast.batch_size,
        "held_out": best.accuracy,
        "epochs": fast.epochs,
        "seconds": seconds,
        "choices": [candidate._asdict() for candidate in candidates],
    }
