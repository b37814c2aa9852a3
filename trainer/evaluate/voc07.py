"""PASCAL VOC 2007 classification by linear SVMs on frozen features: mean average precision (mAP) over the classes.

The protocol of Goyal et al. (arXiv 1905.01235; code facebookresearch/fair_self_supervision_benchmark, tools/svm), whose
figures most papers report: features of the central view after pooling, at unit length; one SVM per class (liblinear:
squared hinge loss, L2, weight 2 for images that show the class). C is chosen among 10^-7 … 10^2 and 2^-19 … 2^-4 by
three-fold cross-validation of the average precision on trainval. The SVM is trained on trainval and evaluated on test.
An image that shows a class only in ways marked as difficult is ignored for that class in training and testing; the
published code uses it as a negative in training.

There are two definitions of average precision, and both are reported. `map` is the area under the precision envelope,
VOC's definition since 2010 and that of the published code. `map_11_point` is the mean of the envelope at recall 0, 0.1,
…, 1, VOC's definition in 2007 (Everingham et al., IJCV 2010, sec. 4.2). AdCo's published figure is neither: its code
ranks the classes of each image instead of the images of each class. `per_image` is that figure, for comparison.
"""

import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field

from data.processes import available_cores
from data.settings import PathText
from data.sources.base import Source
from data.sources.voc import read_split
from trainer.distributed import raise_on_all_ranks
from trainer.evaluate.base import EvaluationContext, Evaluator, Results
from trainer.evaluate.features import embed
from trainer.schema import Section

if TYPE_CHECKING:
    from trainer.config import Config

log = logging.getLogger(__name__)


class Settings(Section):
    """SVMs on the features of PASCAL VOC 2007."""

    root: PathText = Field(
        "VOCdevkit/VOC2007",
        description="Directory of the development kit, with trainval and test.",
        validate_default=True,
    )
    costs: tuple[float, ...] = Field(
        (*(10.0**power for power in range(-7, 3)), *(0.5**power for power in range(4, 20))),
        description="Values of the SVM's cost C, from which cross-validation chooses for each class.",
    )
    folds: int = Field(3, ge=2, description="Number of folds of the cross-validation.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of liblinear.")


class Split(NamedTuple):
    """The readable images of a split, the same on all ranks.

    Attributes:
        x_ND: Unit features, fp32 [N, D].
        labels_NC: 1 for images that show the class, -1 for others, 0 for images that are ignored; int64 [N, C].
        classes: Names of the classes.
        unreadable: Number of images that could not be read.
    """

    x_ND: NDArray[np.float32]
    labels_NC: NDArray[np.int64]
    classes: list[str]
    unreadable: int


def _evaluate(context: EvaluationContext) -> Results:
    with context.interruptible():
        return _evaluate_svms(context)


def _evaluate_svms(context: EvaluationContext) -> Results:
    start, rank_info = time.monotonic(), context.rank_info
    train, test = _embed_split(context, "trainval"), _embed_split(context, "test")
    classes = train.classes
    if test.classes != classes:
        raise ValueError(f"voc07.root: trainval has the classes {classes}, but test has {test.classes}")
    log.info("features of %d and %d images", len(train.x_ND), len(test.x_ND))
    # The ranks share the classes, and those of a machine its cores.
    processes = max(1, available_cores() // rank_info.local_world_size)
    mine = {}
    for c in range(rank_info.rank, len(classes), rank_info.world_size):
        labels = train.labels_NC[:, c], test.labels_NC[:, c]
        mine[c] = classify(train.x_ND, labels[0], test.x_ND, labels[1], context.config.voc07, classes[c], processes)
        log.info("%s: average precision %.4f, C %g", classes[c], mine[c]["average_precision"], mine[c]["cost"])
    of_ranks: list[dict[int, dict[str, Any]]] = [mine] * rank_info.world_size
    dist.all_gather_object(of_ranks, mine)
    found = {c: result for results in of_ranks for c, result in results.items()}
    scores_NC = np.stack([found[c].pop("scores") for c in range(len(classes))], axis=1)
    return {
        "map": float(np.mean([found[c]["average_precision"] for c in found])),
        "map_11_point": float(np.mean([found[c]["average_precision_11_point"] for c in found])),
        "per_image": per_image(test.labels_NC, scores_NC),
        "protocol": "VOC07 SVM",
        "classes": {classes[c]: found[c] for c in sorted(found)},
        "images": [len(train.x_ND), len(test.x_ND)],
        "unreadable": train.unreadable + test.unreadable,
        "seconds": time.monotonic() - start,
    }


def _settings(config: "Config") -> dict[str, Any]:
    return config.voc07.model_dump(exclude={"root"})


def _open_splits(context: EvaluationContext) -> dict[str, Source]:
    return {split: _read_split(context, split)[0] for split in ("trainval", "test")}


EVALUATOR = Evaluator(lambda config, trained: "voc07", _settings, _evaluate, _open_splits)


def classify(
    train_ND: NDArray[np.float32],
    train_N: NDArray[np.int64],
    test_ND: NDArray[np.float32],
    test_N: NDArray[np.int64],
    settings: Settings,
    name: str = "",
    processes: int = 1,
) -> dict[str, Any]:
    """Train and evaluate the SVM of one class.

    Args:
        train_ND: Features to train on.
        train_N: Their labels: 1, -1, or 0 for images that are ignored.
        test_ND: Features to test on.
        test_N: Their labels, likewise.
        settings: Costs, folds and seed.
        name: Name of the class, for error messages.
        processes: Number of processes of the cross-validation.

    Returns:
        The two average precisions, the chosen cost, the average precision in cross-validation, and `scores`, the
        decision function of all test images, [N].

    Raises:
        ValueError: Too few images show the class for cross-validation, or no test image does.
    """
    from joblib.externals.loky import get_reusable_executor
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    used, tested = train_N != 0, test_N != 0
    positives = int((train_N == 1).sum())
    if min(positives, int((train_N == -1).sum())) < settings.folds:
        raise ValueError(
            f"voc07: {positives} of {int(used.sum())} images show {name}: too few for {settings.folds} folds"
        )
    if not (test_N == 1).any():
        raise ValueError(f"voc07: no test image shows {name}")
    search = GridSearchCV(
        LinearSVC(class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=settings.seed),
        {"C": settings.costs},
        scoring="average_precision",
        cv=settings.folds,
        n_jobs=processes,  # processes: threads would share liblinear's random numbers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published protocol stops after 2,000 iterations
        search.fit(train_ND[used], train_N[used])
    if processes > 1:
        get_reusable_executor().shutdown()  # otherwise the processes stay for minutes
    scores_N = search.decision_function(test_ND)
    relevant = test_N[tested] == 1
    return {
        "average_precision": average_precision(relevant, scores_N[tested]),
        "average_precision_11_point": average_precision(relevant, scores_N[tested], points=11),
        "cost": search.best_params_["C"],
        "cross_validation": float(search.best_score_),
        "scores": scores_N,
    }


def average_precision(relevant: NDArray[np.bool_], scores: NDArray[np.floating], points: int | None = None) -> float:
    """Return the average precision of the ranking by falling score, in which ties keep their order.

    The precision at a recall is the largest precision at that recall or a higher one (the envelope).

    Args:
        relevant: Whether each image is relevant, bool [N].
        scores: Score of each image, [N].
        points: Number of recalls from 0 to 1 at which the envelope is averaged; None for the area under it.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    recall, precision = hits / hits[-1], hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points:
        # Compare counts: 3 of 10 is recall 0.3, but less than 0.3 in floating point.
        needed = np.array([-(-i * int(hits[-1]) // (points - 1)) for i in range(points)])
        return float(np.mean(envelope[np.searchsorted(hits, needed)]))
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def per_image(labels_NC: NDArray[np.int64], scores_NC: NDArray[np.floating]) -> float:
    """Return the mean over images of the average precision of the ranking of their classes, which is not the mAP."""
    from sklearn.metrics import average_precision_score

    rows = [(row == 1, scores) for row, scores in zip(labels_NC, scores_NC, strict=True) if (row == 1).any()]
    return float(np.mean([average_precision_score(relevant, scores) for relevant, scores in rows]))


def _read_split(context: EvaluationContext, split: str) -> tuple[Source, list[str], NDArray[np.int64]]:
    """Read the lists of a split. Raises ValueError, on all ranks, if a rank cannot."""
    error = None
    try:
        found = read_split(Path(context.config.voc07.root), split)
    except ValueError as cause:
        error = f"voc07.root: {cause}"
    raise_on_all_ranks(error)
    return found


def _embed_split(context: EvaluationContext, split: str) -> Split:
    """Compute the features of a split and share them with all ranks. Collective."""
    rank_info = context.rank_info
    images, classes, labels_NC = _read_split(context, split)
    mine = np.arange(rank_info.rank, len(images), rank_info.world_size)
    features = embed(context.encoder.backbone, images, mine, rank_info.device, context.config)
    part = (features.x_ND.cpu().numpy(), features.samples_N.numpy())
    parts = [part] * rank_info.world_size
    dist.all_gather_object(parts, part)
    samples = np.concatenate([numbers for _, numbers in parts])
    order = np.argsort(samples)
    x_ND = np.concatenate([x for x, _ in parts])[order]
    return Split(x_ND, labels_NC[samples[order]], classes, len(images) - len(x_ND))
