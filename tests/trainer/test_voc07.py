"""VOC 2007: average precision against values by hand and scikit-learn, ignored images, a run on coloured images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from data.sources.voc import read_split
from tests.ranks import run_ranks
from tests.trainer.evaluations import evaluate_here, write_run
from tests.trainer.small import write_images
from trainer.evaluate.base import Results
from trainer.evaluate.voc07 import EVALUATOR, Settings, average_precision, classify, per_image

RELEVANT = np.array([True, False, True, False, False, True, False, True])
SCORES = np.arange(8, 0, -1) / 8


def test_values_computed_by_hand() -> None:
    """Hits at ranks 1, 3, 6 and 8: precision 1, 2/3, 1/2, 1/2 at recall 1/4, 1/2, 3/4, 1."""
    assert average_precision(RELEVANT, SCORES) == pytest.approx((1 + 2 / 3 + 1 / 2 + 1 / 2) / 4)
    # Recall 0, 0.1, 0.2: 1; 0.3, 0.4, 0.5: 2/3; 0.6 to 1: 1/2.
    assert average_precision(RELEVANT, SCORES, points=11) == pytest.approx((3 * 1 + 3 * 2 / 3 + 5 / 2) / 11)


def test_the_envelope() -> None:
    """The envelope takes the largest precision at higher recalls: hits at ranks 2 and 3 have precision 1/2 and 2/3."""
    relevant, scores = np.array([False, True, True]), np.array([3.0, 2.0, 1.0])
    assert average_precision(relevant, scores) == pytest.approx(2 / 3)
    assert average_precision_score(relevant, scores) == pytest.approx((1 / 2 + 2 / 3) / 2)  # without the envelope
    assert average_precision(relevant, scores, points=11) == pytest.approx(2 / 3)


def test_recalls_are_not_rounded() -> None:
    """Three of ten hits are recall 0.3, although 3 * 0.1 is more than 3 / 10 in floating point."""
    relevant = np.array([True] * 3 + [False] * 7 + [True] * 7)
    expected = (4 * 1 + 7 * 10 / 17) / 11
    assert average_precision(relevant, -np.arange(17.0), points=11) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed: int) -> None:
    """scikit-learn uses no envelope, so ours is larger, or equal if the precision only falls."""
    noise = np.random.default_rng(seed)
    relevant, scores = noise.random(300) < 0.2, noise.normal(size=300)
    order = np.argsort(-scores)
    hits = np.cumsum(relevant[order])
    precision = (hits / np.arange(1, 301))[relevant[order]]
    enveloped = np.maximum.accumulate(precision[::-1])[::-1].mean()
    plain = average_precision_score(relevant, scores)
    assert precision.mean() == pytest.approx(plain)
    assert average_precision(relevant, scores) == pytest.approx(enveloped)
    assert plain < average_precision(relevant, scores) < plain + 0.05
    falling = np.array([True] * 5 + [False, True] * 5 + [False] * 9 + [True])
    descending = -np.arange(len(falling), dtype=float)
    assert average_precision(falling, descending) == pytest.approx(average_precision_score(falling, descending))


def test_per_image_is_not_the_mean_average_precision() -> None:
    """With an offset per image, scores rank the classes of an image well and the images of a class badly."""
    noise = np.random.default_rng(0)
    labels = np.where(noise.random((200, 6)) < 0.25, 1, -1)
    scores = labels + noise.normal(scale=0.5, size=labels.shape) + 4 * noise.normal(size=(200, 1))
    by_class = np.mean([average_precision(labels[:, c] == 1, scores[:, c]) for c in range(6)])
    assert per_image(labels, scores) > 0.95
    assert by_class < 0.6


def test_difficult_images_are_ignored() -> None:
    """Their features do not matter."""
    noise = np.random.default_rng(0)
    labels = np.repeat([1, -1], 30)
    x = noise.normal(size=(60, 4)).astype(np.float32) + labels[:, None]
    settings = Settings(costs=(0.1, 1.0))
    alone = classify(x, labels, x, labels, settings)
    wild = np.concatenate([x, -9 * x[:10]])
    marked = np.concatenate([labels, np.zeros(10, np.int64)])
    beside = classify(wild, marked, wild, marked, settings)
    assert beside["average_precision"] == alone["average_precision"]
    assert (beside["scores"][:60] == alone["scores"]).all()
    called_negative = classify(wild, np.where(marked == 0, -1, marked), x, labels, settings)
    assert (called_negative["scores"] != alone["scores"]).any()
    with pytest.raises(ValueError, match="2 of 60 images show cats: too few for 3 folds"):
        classify(x, np.array([1, 1] + [-1] * 58), x, labels, settings, "cats")
    with pytest.raises(ValueError, match="no test image shows cats"):
        classify(x, labels, x, -np.ones(60, int), settings, "cats")


def write_voc(root: Path, splits: tuple[str, ...] = ("trainval", "test"), each: int = 40) -> Path:
    """Write images whose halves are grey, red or green; the sixth image of a split is marked as difficult."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for split in splits:
        shown = noise.integers(0, 3, (each, 2))
        lines: dict[str, list[str]] = {"red": [], "green": []}
        for i, sides in enumerate(shown.tolist()):
            name = f"{splits.index(split):03d}{i:03d}"
            image = noise.integers(0, 60, (20, 20, 3), np.uint8)
            for half, colour in enumerate(sides):
                if colour:
                    image[:, 10 * half : 10 * half + 10, colour] += 150
            assert cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image)
            for name_of, colour in (("red", 2), ("green", 1)):
                present = "1" if colour in sides else "-1"
                lines[name_of].append(f"{name} {'0' if i == 5 else present:>2}")
        main = root / "ImageSets" / "Main"
        (main / f"{split}.txt").write_text("".join(f"{line.split()[0]}\n" for line in lines["red"]))
        for colour_name, rows in lines.items():
            (main / f"{colour_name}_{split}.txt").write_text("\n".join(rows) + "\n")
    return root


def test_the_lists(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2007")
    images, classes, labels = read_split(root, "test")
    assert (len(images), classes, labels.shape) == (40, ["green", "red"], (40, 2))
    assert (labels[5] == 0).all()
    assert set(labels[:5].ravel().tolist()) <= {1, -1}
    assert images.name(7) == "001007.jpg"
    assert images.image(7).shape == (20, 20, 3)
    listed = root / "ImageSets" / "Main" / "red_test.txt"
    listed.write_text(listed.read_text().replace("001003", "001004", 1))
    with pytest.raises(ValueError, match=r"red_test\.txt needs the identifiers of test\.txt in their order"):
        read_split(root, "test")
    with pytest.raises(ValueError, match=r"val\.txt: No such file or directory: need VOC's development kit"):
        read_split(root, "val")


def on_ranks(run: Path, root: Path) -> Results:
    return evaluate_here(EVALUATOR, run, [f"voc07.root={root}", "voc07.costs=[0.1,1,10]"])


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """An unreadable image is ignored and counted; two ranks share images and classes."""
    root = write_voc(tmp_path / "VOC2007")
    (root / "JPEGImages" / "001009.jpg").write_bytes(b"")
    images = write_images(tmp_path / "images")
    found = []
    for world_size in (1, 2):
        run = write_run(tmp_path / f"run-{world_size}", images)
        found.append(run_ranks(world_size, on_ranks, run, root)[0])
    one, two = found
    assert one["map"] > 0.8
    assert one["map"] == pytest.approx(two["map"], abs=1e-6)
    assert (one["images"], one["unreadable"]) == ([40, 39], 1)
    assert one["map"] == pytest.approx(
        np.mean([one["classes"][name]["average_precision"] for name in ("red", "green")])
    )
    assert one["per_image"] != one["map"]
    assert one["classes"]["red"]["cost"] in (0.1, 1, 10)
