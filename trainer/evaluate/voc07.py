"""PASCAL VOC 2007 classification by linear SVMs on frozen features: mean over classes of the average precision (mAP).

Protocol of Goyal et al. (arXiv 1905.01235; code facebookresearch/fair_self_supervision_benchmark, tools/svm), whose
figures most papers print: backbone's features after pooling, of the central view, at unit length; for each class an SVM
(liblinear: squared hinge loss, L2, weight 2 for pictures that show the class), C of 10^-7 … 10^2 and 2^-19 … 2^-4 by
three-fold cross-validation of the average precision on trainval; trained on trainval, tried on test. Pictures that show
only difficult ones of a class count for that class neither in training (theirs take them for negatives) nor in testing.

Average precision has two definitions, and both are printed. `map`: area under the precision envelope, VOC's own since
2010 and that of the code above. `map_11_point`: mean of the envelope at recall 0, 0.1, …, 1, VOC's own in 2007
(Everingham et al., IJCV 2010, sec. 4.2). Neither is AdCo's published figure, which ranks the classes of each picture
instead of the pictures of each class (`average_precision` of rows instead of columns): `per_image`, printed to compare.
"""

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from joblib.externals.loky import get_reusable_executor
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from data.sources.voc import read_split
from trainer.config import Voc07
from trainer.distributed import raise_on_all_ranks
from trainer.evaluate.base import EvaluationContext, Evaluator, Results
from trainer.evaluate.features import embed

log = logging.getLogger(__name__)


def _evaluate(context: EvaluationContext) -> Results:
    began, rank_info = time.monotonic(), context.rank_info
    features, labels, unreadable = {}, {}, 0
    classes: list[str] = []
    for split in ("trainval", "test"):
        x_ND, labels_NC, names, total = _features(context, split)
        if classes and names != classes:
            raise ValueError(f"voc07.root: trainval has the classes {classes}, test {names}")
        classes, features[split], labels[split] = names, x_ND, labels_NC
        unreadable += total - len(x_ND)
    log.info("features of %d and %d images", len(features["trainval"]), len(features["test"]))
    # Each rank has its classes, and its share of the cores.
    jobs = max(1, len(os.sched_getaffinity(0)) // rank_info.local_world_size)
    mine = {}
    for c in range(rank_info.rank, len(classes), rank_info.world_size):
        train, test = (labels[split][:, c] for split in ("trainval", "test"))
        mine[c] = classify(features["trainval"], train, features["test"], test, context.config.voc07, classes[c], jobs)
        log.info("%s: average precision %.4f, C %g", classes[c], mine[c]["average_precision"], mine[c]["cost"])
    everyones: list[dict[int, dict[str, Any]]] = [mine] * rank_info.world_size
    dist.all_gather_object(everyones, mine)
    found = {c: result for part in everyones for c, result in part.items()}
    scores_NC = np.stack([found[c].pop("scores") for c in range(len(classes))], axis=1)
    return {
        "protocol": "VOC07 SVM",
        "map": float(np.mean([found[c]["average_precision"] for c in found])),
        "map_11_point": float(np.mean([found[c]["average_precision_11_point"] for c in found])),
        "per_image": per_image(labels["test"], scores_NC),
        "classes": {classes[c]: found[c] for c in sorted(found)},
        "images": [len(features["trainval"]), len(features["test"])],
        "unreadable": unreadable,
        "seconds": time.monotonic() - began,
    }


def classify(
    train_ND: NDArray[np.float32],
    train_N: NDArray[np.int64],
    test_ND: NDArray[np.float32],
    test_N: NDArray[np.int64],
    settings: Voc07,
    name: str = "",
    jobs: int = 1,
) -> dict[str, Any]:
    """One class: labels 1, -1 and 0 (left out); its average precisions, the C chosen, and `scores` of all test images.

    jobs: processes for the cross-validation.

    Raises ValueError if a class has too few pictures for cross-validation, or none to test on.
    """
    known, asked = train_N != 0, test_N != 0
    shown = int((train_N == 1).sum())
    if min(shown, int((train_N == -1).sum())) < settings.folds:
        raise ValueError(
            f"voc07: {shown} of {int(known.sum())} pictures show {name}: too few for {settings.folds} folds"
        )
    if not (test_N == 1).any():
        raise ValueError(f"voc07: no test picture shows {name}")
    search = GridSearchCV(
        LinearSVC(class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=settings.seed),
        {"C": settings.costs},
        scoring="average_precision",
        cv=settings.folds,
        n_jobs=jobs,  # processes: threads would share liblinear's random numbers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 2,000 rounds, as in the published protocol
        search.fit(train_ND[known], train_N[known])
    if jobs > 1:
        get_reusable_executor().shutdown()  # its processes would outlive this one by minutes
    scores_N = search.decision_function(test_ND)
    relevant = test_N[asked] == 1
    return {
        "average_precision": average_precision(relevant, scores_N[asked]),
        "average_precision_11_point": average_precision(relevant, scores_N[asked], points=11),
        "cost": search.best_params_["C"],
        "cross_validation": float(search.best_score_),
        "scores": scores_N,
    }


def average_precision(relevant: NDArray[np.bool_], scores: NDArray[np.floating], points: int | None = None) -> float:
    """Of a ranking of N images by falling score, ties in their order.

    Precision at a recall is the best precision at that recall or a higher one (the envelope). The area under it, or
    with `points` its mean at so many recalls from 0 to 1.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    recall, precision = hits / hits[-1], hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points:
        # Counts, not shares: 3 of 10 is recall 0.3, and in floating point less than that.
        needed = np.array([-(-i * int(hits[-1]) // (points - 1)) for i in range(points)])
        return float(np.mean(envelope[np.searchsorted(hits, needed)]))
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def per_image(labels_NC: NDArray[np.int64], scores_NC: NDArray[np.floating]) -> float:
    """What is not mAP: the mean over images of the average precision of the ranking of their classes."""
    rows = [(row == 1, scores) for row, scores in zip(labels_NC, scores_NC, strict=True) if (row == 1).any()]
    return float(np.mean([average_precision_score(shown, scores) for shown, scores in rows]))


def _features(context: EvaluationContext, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str], int]:
    """Unit rows of the images that can be read, in their order, and their labels, on all ranks; classes; all images."""
    rank_info, error = context.rank_info, None
    try:
        images, classes, labels_NC = read_split(Path(context.config.voc07.root), split)
    except ValueError as refusal:
        error = f"voc07.root: {refusal}"
    raise_on_all_ranks(error)
    found = embed(
        context.encoder,
        images,
        np.arange(rank_info.rank, len(images), rank_info.world_size),
        rank_info.device,
        context.config,
    )
    part = (found.x_ND.cpu().numpy(), found.samples_N.numpy())
    parts = [part] * rank_info.world_size
    dist.all_gather_object(parts, part)
    samples = np.concatenate([numbers for _, numbers in parts])
    order = np.argsort(samples)
    return np.concatenate([x for x, _ in parts])[order], labels_NC[samples[order]], classes, len(images)


EVALUATOR = Evaluator(lambda config, trained: "voc07", lambda config: config.voc07.model_dump(), _evaluate)
