"""Linear evaluation by both protocols: accuracy, a backbone that does not change, and no choice on the test images."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from data.loader import train_batches
from data.views import Augment, View
from tests.ranks import run_ranks
from tests.trainer.evaluations import NARROW, evaluate_here, write_run
from tests.trainer.small import small_config, write_images
from trainer.__main__ import app
from trainer.build import build_encoder
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.evaluate import fit, linear, linear_fast, probe
from trainer.evaluate.base import Results
from trainer.evaluate.linear import EVALUATOR
from trainer.evaluate.probe import Classifier
from trainer.evaluate.run import weights_checksum
from trainer.ops.stop import Stopped
from trainer.run import checkpoint
from trainer.run.results import read_evaluations
from trainer.run.sources import open_sources

FULL = ["linear.epochs=4", "linear.batch_size=12", "linear.lr=1", "linear.scale=[0.5,1]"]
FAST = [
    "linear.fast=true",
    "fast.batch_size=16",
    "fast.epochs=30",
    "fast.lrs=[0.1,1,10]",
    "fast.weight_decays=[0,1e-4]",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Path:
    return write_run(tmp_path / "run", images)


@pytest.mark.usefixtures("small_group")
@pytest.mark.parametrize("settings", [FULL, FAST], ids=["full", "fast"])
def test_separable_classes_are_learned(run: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate_here(EVALUATOR, run, settings)
    assert results["top1"] >= 0.98
    assert (results["top5"], results["images"], results["unreadable"]) == (1.0, 72, 0)
    name = "linear-fast" if settings is FAST else "linear"
    assert json.loads((run / name / "results.json").read_text()) == results
    again = evaluate_here(EVALUATOR, run, settings, "again")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in results.items() if k != "seconds"}
    assert evaluate_here(EVALUATOR, run, settings) == results  # finished: printed only
    with pytest.raises(ValueError, match=rf"{name} holds another evaluation: seed was 0, now 1. Choose another --name"):
        evaluate_here(EVALUATOR, run, [*settings, "linear.seed=1"])
    with pytest.raises(ValueError, match=r"\.\./x"):
        evaluate_here(EVALUATOR, run, settings, "../x")


@pytest.mark.usefixtures("small_group")
def test_the_published_step(run: Path, images: Path) -> None:
    """The weights are those of a plain loop over the features of the same crops."""
    settings = ["linear.epochs=2", "linear.batch_size=36", "linear.lr=10"]
    evaluate_here(EVALUATOR, run, settings)
    saved = checkpoint.newest(run / "linear" / "checkpoints")
    assert saved
    state = {"classifier": {"weight": torch.empty(3, 16), "bias": torch.empty(3)}}
    checkpoint.load(saved, state)

    config = small_config(run, images, model=NARROW, data={"batch_size": 36})
    encoder = build_encoder(config).eval()
    data = config.data.model_copy(
        update={
            "views": (View(size=16, scale=(0.08, 1)),),
            "augment": Augment(jitter=0, gray=0, blur=0),
        }
    )
    weight = torch.empty(3, 16).normal_(std=0.01, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=10, momentum=0.9)
    train = open_sources(config.data, run)[0]
    cpu = torch.device("cpu")
    for step, batch in enumerate(train_batches(train, data, config.run.seed, 0, 1, 0, 4, cpu)):
        with torch.no_grad():
            x = encoder.backbone(*batch.normalized(cpu))
        optimizer.param_groups[0]["lr"] = [10, 10, 5.005, 5.005][step]  # after an epoch, half way from 10 to 0.01
        optimizer.zero_grad()
        F.cross_entropy(x @ weight.T + bias, torch.from_numpy(train.labels)[batch.samples]).backward()
        optimizer.step()
    torch.testing.assert_close(state["classifier"]["weight"], weight.detach())
    torch.testing.assert_close(state["classifier"]["bias"], bias.detach())


def on_ranks(run: Path, settings: list[str]) -> Results:
    return evaluate_here(EVALUATOR, run, settings)


@pytest.mark.parametrize("settings", [FULL, FAST], ids=["full", "fast"])
def test_the_number_of_ranks_does_not_matter(tmp_path: Path, images: Path, settings: list[str]) -> None:
    """The labels are noisy, so that the accuracy is below 1."""
    noisy = write_images(tmp_path / "noisy", each=25)
    for path in sorted(noisy.glob("class-0/*"))[:9]:
        path.rename(noisy / "class-1" / f"from-0-{path.name}")
    found = []
    for world_size in (1, 2):
        run = write_run(tmp_path / f"run-{world_size}", noisy)
        ranks = run_ranks(world_size, on_ranks, run, settings)
        assert ranks[0] == ranks[-1]
        found.append(ranks[0])
    one, two = found
    assert one["images"] == two["images"] == 75
    assert one["top1"] < 1
    assert one["top1"] == pytest.approx(two["top1"], abs=1.5 / 75)
    if settings is FAST:
        assert (one["lr"], one["weight_decay"]) == (two["lr"], two["weight_decay"])
    else:
        losses = [
            [
                json.loads(line)["loss"]
                for line in (tmp_path / f"run-{world_size}/linear/metrics.jsonl").read_text().splitlines()
            ]
            for world_size in (1, 2)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.usefixtures("small_group")
def test_a_changed_backbone_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm is in training mode, as in some published code."""
    monkeypatch.setattr(Classifier, "train", torch.nn.Module.train)
    with pytest.raises(RuntimeError, match="the backbone has changed"):
        evaluate_here(EVALUATOR, run, FULL)
    assert not (run / "linear" / "results.json").exists()


def test_the_checksum_depends_on_every_bit() -> None:
    network = torch.nn.BatchNorm1d(3)
    before = weights_checksum(network)
    assert weights_checksum(network) == before
    network.running_mean.view(torch.int32)[1] ^= 1  # type: ignore[union-attr]
    assert weights_checksum(network) != before


@pytest.mark.usefixtures("small_group")
def test_the_test_images_choose_nothing(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels on the test images change the accuracy only, and the images are used once."""
    poisoned = tmp_path / "poisoned"
    for c in range(3):
        (poisoned / f"class-{c}").parent.mkdir(exist_ok=True)
        (poisoned / f"class-{c}").symlink_to(images / f"class-{(c + 1) % 3}")
    run = write_run(tmp_path / "run", images)
    calls = []

    def score(*arguments: Any) -> probe.Score:
        calls.append(arguments)
        return probe.score(*arguments)

    monkeypatch.setattr(linear, "score", score)
    good = evaluate_here(EVALUATOR, run, FAST, "good")
    bad = evaluate_here(EVALUATOR, run, [*FAST, f"data.val={poisoned}"], "bad")
    assert len(calls) == 2
    assert good["top1"] > 0.9
    assert bad["top1"] < 0.1
    assert {k for k in good if good[k] != bad[k]} <= {"top1", "seconds"}


@pytest.mark.usefixtures("small_group")
def test_test_images_with_other_classes(tmp_path: Path, images: Path) -> None:
    """The test images have two of three classes, with other indices."""
    few = tmp_path / "few"
    few.mkdir()
    for c in (1, 2):
        (few / f"class-{c}").symlink_to(images / f"class-{c}")
    results = evaluate_here(EVALUATOR, write_run(tmp_path / "run", images), [*FAST, f"data.val={few}"])
    assert (results["images"], results["classes"]) == (48, 3)
    assert results["top1"] > 0.9


@pytest.mark.usefixtures("small_group")
@pytest.mark.parametrize("settings", [FULL, FAST], ids=["full", "fast"])
def test_unreadable_images(tmp_path: Path, settings: list[str]) -> None:
    train, test = write_images(tmp_path / "train"), write_images(tmp_path / "test", each=5)
    for folder in (train, test):
        (folder / "class-1" / "003.png").write_bytes(b"no picture")
    run = write_run(tmp_path / "run", train, data={"val": str(test), "max_unreadable": 0.1})
    results = evaluate_here(EVALUATOR, run, settings)
    assert (results["images"], results["unreadable"]) == (14, 1)
    assert results["top1"] > 0.9


def standardised(x_ND: torch.Tensor, labels: list[int]) -> linear_fast.CachedFeatures:
    x_ND = torch.cat([x_ND, torch.empty(len(x_ND), 1)], dim=1)
    mean_D, scale = linear_fast._standardise(x_ND)
    samples, cpu = np.arange(len(x_ND)), torch.device("cpu")
    return linear_fast.CachedFeatures(
        x_ND[:, None], samples, np.array(labels), len(set(labels)), samples, mean_D, scale, cpu
    )


@pytest.mark.usefixtures("small_group")
def test_each_classifier_trains_as_if_alone() -> None:
    """The results are those of torch's SGD and autograd, although another classifier diverges."""
    generator = torch.Generator().manual_seed(0)
    x_ND, labels = 7 + 3 * torch.randn(60, 5, generator=generator), [i % 3 for i in range(60)]
    features = standardised(x_ND.clone(), labels)
    assert features.x_NVD[:, 0, :-1].mean(0).abs().max() < 1e-6
    assert features.x_NVD[:, 0, :-1].square().sum(1).mean() == pytest.approx(1)
    fast = Config.model_validate(
        {"run": {"dir": "x", "epochs": 1}, "data": {"train": "x"}, "fast": {"batch_size": 60, "epochs": 7}}
    ).fast
    samples = np.arange(60)
    pairs = [(1.0, 0.0), (1e38, 1.0), (3.0, 0.01)]
    w_HCD = linear_fast.train_classifiers(features, samples, pairs, fast, 0)
    assert not w_HCD[1].isfinite().all()
    for number in (0, 2):
        weight = torch.zeros(3, 6, requires_grad=True)
        lr, decay = pairs[number]
        optimizer = torch.optim.SGD([weight], lr=lr, momentum=0.9, weight_decay=decay)
        for step in range(7):
            optimizer.param_groups[0]["lr"] = lr * (1 + np.cos(np.pi * step / 7)) / 2
            optimizer.zero_grad()
            F.cross_entropy(features.x_NVD[:, 0] @ weight.T, torch.tensor(labels)).backward()
            optimizer.step()
        torch.testing.assert_close(w_HCD[number], weight.detach(), rtol=1e-4, atol=1e-5)
    layer = linear_fast.to_linear_layer(w_HCD[0], features)
    torch.testing.assert_close(
        x_ND @ layer["weight"].T + layer["bias"], features.x_NVD[:, 0] @ w_HCD[0].T, rtol=1e-4, atol=1e-5
    )
    accuracies = linear_fast._accuracies(features, samples, w_HCD)
    assert accuracies[1] == 0
    assert min(accuracies[0], accuracies[2]) > 0


def test_features_that_do_not_fit_in_memory_are_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Free memory does not count: after a training the page cache has most of it, and gives it back.
    monkeypatch.setattr(os, "sysconf", lambda name: 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 4 * 10 * 4))
    features = linear_fast._allocate_features((10, 4), RankInfo(torch.device("cpu"), 0, 1, 1), tmp_path)
    features[:] = 3
    assert features.sum() == 120
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert "kept in a file" in caplog.text
    caplog.clear()
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 4 * 10 * 4 + 1))
    linear_fast._allocate_features((10, 4), RankInfo(torch.device("cpu"), 0, 1, 1), tmp_path)
    assert not caplog.text


def interrupted(run: Path) -> str:
    """Stop the training in its fifth step, then run it to the end. Returns the message of the stop."""
    plain = fit.update
    steps = []

    def update(*arguments: Any) -> None:
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(*arguments)

    fit.update = update  # type: ignore[assignment]
    try:
        evaluate_here(EVALUATOR, run, FULL)
    except Stopped as stopped:
        words = str(stopped)
    fit.update = plain
    evaluate_here(EVALUATOR, run, FULL)
    return words


def test_it_continues_after_a_stop(tmp_path: Path, images: Path) -> None:
    cut, whole = write_run(tmp_path / "cut", images), write_run(tmp_path / "whole", images)
    (words,) = run_ranks(1, interrupted, cut)
    assert words == "stopped after step 6 (SIGTERM): the same command resumes the run"
    run_ranks(1, on_ranks, whole, FULL)
    manifests = [(run / "linear/checkpoints/step-00000024/manifest.json").read_text() for run in (cut, whole)]
    assert json.loads(manifests[0])["__0_0.distcp"] == json.loads(manifests[1])["__0_0.distcp"]
    losses = [
        [json.loads(line)["loss"] for line in (run / "linear/metrics.jsonl").read_text().splitlines()][-10:]
        for run in (cut, whole)
    ]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("small_group")
def test_errors(run: Path, tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match=r"give data\.val"):
        evaluate_here(EVALUATOR, run, ["data.val=null"])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000004").mkdir()
    with pytest.raises(ValueError, match="checkpoints is not the directory of an evaluation"):
        evaluate_here(EVALUATOR, run, [], "checkpoints")
    with pytest.raises(ValueError, match=r"epoch.*not finite|not finite.*lower learning rate"):
        evaluate_here(EVALUATOR, run, [*FULL, "linear.lr=1e38"], "large")
    (run / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a safetensors file"):
        evaluate_here(EVALUATOR, run, [])
    (run / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="all of them are damaged"):
        evaluate_here(EVALUATOR, run, [])
    (run / "checkpoints" / "step-00000004").rmdir()
    with pytest.raises(ValueError, match="has no usable checkpoint"):
        evaluate_here(EVALUATOR, run, [])


@pytest.mark.usefixtures("small_group")
def test_weights_of_another_backbone(run: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.safetensors does not fit .*other shapes"):
        evaluate_here(EVALUATOR, run, ["model.backbone_args={channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}"])


def test_the_command(run: Path) -> None:
    result = CliRunner().invoke(app, ["linear", str(run), *FAST, "--fast", "--name", "mine"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["protocol"] == "fast linear"
    assert read_evaluations(run).keys() == {"mine"}
