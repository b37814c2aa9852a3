"""kNN accuracy against a plain computation over all features at once, for any distribution over the ranks."""

import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from data.sources.base import Source
from tests.ranks import run_ranks
from tests.trainer.evaluations import evaluate_here, write_run
from tests.trainer.small import write_images
from trainer.config import Config
from trainer.evaluate import knn
from trainer.evaluate.features import Features
from trainer.run import checkpoint
from trainer.run.results import read_evaluations

TRAIN, TEST, CLASSES = 301, 53, 5
SETTINGS = [
    (1, 0.1),
    (20, 0.07),
    (200, 0.1),
    (1000, 0.5),
    (20, 0.002),
]  # among them DINO's, the original, more than exist, and one whose weights underflow unless they are relative
# The end of each rank's range: uneven, and the second of three ranks has no train features.
TRAIN_ENDS = {1: [TRAIN], 2: [40, TRAIN], 3: [150, 150, TRAIN]}
TEST_ENDS = {1: [TEST], 2: [TEST, TEST], 3: [17, 50, TEST]}


def make_features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train features and labels, and test features and labels, of noisy classes."""
    generator = torch.Generator().manual_seed(0)
    centers_CD = torch.randn(CLASSES, 8, generator=generator)
    labels_N = torch.randint(CLASSES, (TRAIN + TEST,), generator=generator)
    x_ND = F.normalize(centers_CD[labels_N] + 1.5 * torch.randn(TRAIN + TEST, 8, generator=generator), dim=1)
    return x_ND[:TRAIN], labels_N[:TRAIN], x_ND[TRAIN:], labels_N[TRAIN:]


def plain_accuracy(k: int, temperature: float) -> float:
    train, train_labels, test, test_labels = (x.numpy() for x in make_features())
    right = 0
    for x, label in zip(test.astype(np.float64), test_labels, strict=True):
        similarity = train.astype(np.float64) @ x
        votes = np.zeros(CLASSES)
        for i in np.argsort(-similarity)[:k]:
            votes[train_labels[i]] += np.exp(similarity[i] / temperature)
        right += votes.argmax() == label
    return float(right / len(test))


def part(x_ND: Tensor, labels_N: Tensor, ends: list[int]) -> Features:
    rank = dist.get_rank()
    mine = slice(ends[rank - 1] if rank else 0, ends[rank])
    return Features(x_ND[mine], labels_N[mine], torch.arange(len(labels_N))[mine])


def accuracies(chunk: int) -> list[float]:
    knn._CHUNK = chunk
    train, train_labels, test, test_labels = make_features()
    train_part = part(train, train_labels, TRAIN_ENDS[dist.get_world_size()])
    test_part = part(test, test_labels, TEST_ENDS[dist.get_world_size()])
    return [knn.accuracy(train_part, test_part, CLASSES, k, temperature) for k, temperature in SETTINGS]


@pytest.mark.parametrize(("world_size", "chunk"), [(1, 512), (2, 8), (3, 512), (3, 8)])
def test_it_agrees_with_a_plain_computation(world_size: int, chunk: int) -> None:
    expected = [plain_accuracy(*setting) for setting in SETTINGS]
    assert len(set(expected)) > 1
    for got in run_ranks(world_size, accuracies, chunk):
        assert got == pytest.approx(expected)


@dataclass
class Colours:
    """Images of one of three colours; `said` are the colours that the labels name, which may be wrong."""

    classes: list[str]
    colours: list[str]
    said: list[str]

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([self.classes.index(name) for name in self.said])

    def __len__(self) -> int:
        return len(self.colours)

    def name(self, i: int) -> str:
        return f"{self.colours[i]} {i}"

    def read(self, i: int) -> NDArray[np.uint8]:
        return self.image(i)

    def image(self, i: int) -> NDArray[np.uint8]:
        image = np.zeros((16, 16, 3), np.uint8)
        image[:, :, ["red", "green", "blue"].index(self.colours[i])] = 255
        return image


MEAN_COLOUR = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

CONFIG = Config.model_validate(
    {
        "run": {"dir": "x", "epochs": 1},
        "data": {"train": "x", "workers": 0, "views": [{"size": 16}, {"size": 16}]},
        "eval": {"k": 2, "batch_size": 3},
    }
)


def colours(few: int = 7) -> tuple[Colours, Colours]:
    names = ["red", "green", "blue"]
    train = Colours(names, names * 3, names * 3)
    shown = [*names, *names, "blue"]
    said = [*names, "red", "red", "red", "blue"]  # 5 of 7 labels are right
    return train, Colours(["blue", "red", "green"], shown[:few], said[:few])


def evaluate_colours(few: int = 7) -> dict[str, float]:
    train, test = colours(few)
    tests = {
        "wrong labels": test,
        "right labels": Colours(["green", "red"], ["red", "green", "red"], ["red", "green", "red"]),
    }
    return knn.evaluate(MEAN_COLOUR, train, {**tests}, torch.device("cpu"), CONFIG)


def evaluate_pixels() -> dict[str, float]:
    return knn.evaluate_pixels(*colours(), torch.device("cpu"), CONFIG)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_counts_once_under_its_own_class(world_size: int) -> None:
    expected = {"wrong labels": pytest.approx(5 / 7), "right labels": 1.0}
    assert run_ranks(world_size, evaluate_colours) == [expected] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_pixels_are_classified_like_features(world_size: int) -> None:
    assert run_ranks(world_size, evaluate_pixels) == [{"knn_pixels": pytest.approx(5 / 7)}] * world_size


@pytest.mark.usefixtures("small_group")
@pytest.mark.parametrize("size", [16, 24])
def test_pixels_are_not_classified_where_they_take_much_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The limit is that of the evaluated size, which need not be the views'. There are 9 and 7 images."""
    config = CONFIG.model_copy(update={"eval": CONFIG.eval.model_copy(update={"size": size})})
    for limit, keys in (((9 + 7) * 3 * size**2 * 4, ["knn_pixels"]), ((9 + 7) * 3 * size**2 * 4 - 1, [])):
        monkeypatch.setattr(knn, "MAX_PIXEL_BYTES", limit)
        assert list(knn.evaluate_pixels(*colours(), torch.device("cpu"), config)) == keys


def test_pixels_of_imagenet_are_not_read() -> None:
    """1.28 million images of 224 pixels take 771 GB."""
    imagenet = cast(Source, range(1_281_167))
    config = Config.model_validate({"run": {"dir": "x", "epochs": 1}, "data": {"train": "x"}})
    assert knn.evaluate_pixels(imagenet, imagenet, torch.device("cpu"), config) == {}


def test_fewer_images_than_ranks() -> None:
    with pytest.raises(ValueError, match="1 images are too few for 2 ranks"):
        run_ranks(2, evaluate_colours, 1)


@pytest.mark.usefixtures("small_group")
def test_other_settings_than_the_runs_have_their_own_directory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_images(tmp_path / "images", each=8))
    own = evaluate_here(knn.EVALUATOR, run, [])
    other = evaluate_here(knn.EVALUATOR, run, ["eval.k=3", "eval.temperature=0.07"])
    assert [(result["k"], result["temperature"]) for result in (own, other)] == [(5, 0.1), (3, 0.07)]
    assert read_evaluations(run) == {"knn": own, "knn-k3-t0.07": other}
    assert 0 < own["knn_pixels"] <= 1


@pytest.mark.usefixtures("small_group")
def test_further_test_images_have_names(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_images(tmp_path / "images", each=8))
    two = write_images(tmp_path / "two", classes=2, each=5)
    plain = evaluate_here(knn.EVALUATOR, run, [])
    results = evaluate_here(knn.EVALUATOR, run, [f"data.more_val.two={two}"], "more")
    assert 0 < results["knn_two"] <= 1
    assert next(iter(results)) == "knn", "the primary metric"
    assert {key: value for key, value in results.items() if key != "knn_two"} == plain
    with pytest.raises(
        ValueError, match=r"data.more_val.two: .*two has changed|holds another evaluation: more_val.two"
    ):
        evaluate_here(knn.EVALUATOR, run, [f"data.more_val.two={write_images(tmp_path / 'x', each=5)}"], "more")


@pytest.mark.usefixtures("small_group")
def test_a_run_that_deletes_the_checkpoint_meanwhile(tmp_path: Path) -> None:
    """Training goes on; the checkpoint was the newest when it was chosen. Its weights are a pipe: the reader waits."""
    run = write_run(tmp_path / "run", write_images(tmp_path / "images", each=8))
    weights = load_file(run / "weights.safetensors")
    (run / "weights.safetensors").unlink()
    state = {"student": {name.removeprefix("student."): x for name, x in weights.items()}}
    for folder, step in (("checkpoints", 10), ("newer", 20)):
        assert checkpoint.save(run / folder, step, state, keep=2)
    old = run / "checkpoints" / "step-00000010"
    (old / "manifest.json").write_text("{}")
    (old / "weights.safetensors").unlink()
    os.mkfifo(old / "weights.safetensors")

    def prune() -> None:
        with (old / "weights.safetensors").open("w"):
            (run / "newer" / "step-00000020").rename(old.with_name("step-00000020"))
            shutil.rmtree(old)

    thread = threading.Thread(target=prune)
    thread.start()
    assert evaluate_here(knn.EVALUATOR, run, [])["step"] == 20
    thread.join()
