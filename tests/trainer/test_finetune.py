"""Fine-tuning: the mean over seeds, the labelled subset, the learning rates of layers, resuming after a stop."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoder import Encoder
from tests.ranks import run_ranks
from tests.trainer.evaluations import NARROW, evaluate_here, write_run
from tests.trainer.small import VIT, VIT_ARGS, write_images
from trainer.config import Config
from trainer.engines.base import update
from trainer.engines.optim import Sgd
from trainer.evaluate.base import Results
from trainer.evaluate.finetune import EVALUATOR, Settings, parameter_groups, summarise
from trainer.evaluate.probe import Classifier
from trainer.ops.stop import Stopped

SMALL = ["finetune.labels=0.5", "finetune.batch_size=12", "finetune.epochs=4", "finetune.lr=1", "finetune.seeds=[0,7]"]
UNUSED = {"backbone": f"{Path(__file__).with_name('test_engines.py')}:TwoBlocks", "backbone_args": {}, "dim": 16}
DROPPED = {**VIT, "backbone_args": {**VIT_ARGS, "drop_path_rate": 0.5}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.mark.usefixtures("small_group")
def test_two_seeds_and_their_mean(tmp_path: Path, images: Path) -> None:
    run = write_run(tmp_path / "run", images)
    results = evaluate_here(EVALUATOR, run, SMALL)
    assert [result["seed"] for result in results["seeds"]] == [0, 7]
    values = [result["top1"] for result in results["seeds"]]
    assert results["top1"] == statistics.mean(values) > 0.8
    assert results["top1_deviation"] == pytest.approx(statistics.stdev(values))
    assert (results["labels"], results["labels_a_class"], results["images"]) == (36, [12, 12], 72)
    subset = (run / "finetune-50pct" / "subset.txt").read_text().splitlines()
    assert len(set(subset)) == 36
    # The list gives the same subset; a seed gives the same training whether or not another one came before it.
    listed = ["finetune.seeds=[7]", f"finetune.subset_list={run}/finetune-50pct/subset.txt"]
    again = evaluate_here(EVALUATOR, run, [*SMALL, *listed], "listed")
    assert again["seeds"][0]["top1"] == results["seeds"][1]["top1"]
    assert again["top1_deviation"] is None
    assert (run / "listed" / "subset.txt").read_text().splitlines() == subset
    rows = [
        [json.loads(line)["loss"] for line in (run / path / "metrics.jsonl").read_text().splitlines()]
        for path in ("finetune-50pct/seed-0", "finetune-50pct/seed-7", "listed/seed-7")
    ]
    assert rows[0] != rows[1] == rows[2]
    # The number of epochs depends on the share of the images in the list, not on finetune.labels.
    tenth = tmp_path / "a-few.txt"
    tenth.write_text("\n".join(subset[:12]))
    few = ["finetune.batch_size=12", f"finetune.subset_list={tenth}", "finetune.seeds=[0]"]
    assert evaluate_here(EVALUATOR, run, few)["epochs"] == 30
    assert (run / "finetune-a-few" / "results.json").exists()
    with pytest.raises(ValueError, match="nowhere: No such file"):
        evaluate_here(EVALUATOR, run, [*SMALL, "finetune.subset_list=nowhere"])
    with pytest.raises(ValueError, match="subset_seed was 0, now 1"):
        evaluate_here(EVALUATOR, run, [*SMALL, "finetune.subset_seed=1"])


def on_ranks(run: Path) -> Results:
    return evaluate_here(EVALUATOR, run, [*SMALL, "finetune.seeds=[0]"])


@pytest.mark.parametrize("model", [NARROW, UNUSED], ids=["resnet", "unused parameters"])
def test_the_number_of_ranks_does_not_matter(tmp_path: Path, images: Path, model: dict[str, Any]) -> None:
    """BatchNorm is synchronised over all ranks."""
    losses = []
    for world_size in (1, 2):
        run = write_run(tmp_path / f"run-{world_size}", images, model=model)
        run_ranks(world_size, on_ranks, run)
        text = (run / "finetune-50pct/seed-0/metrics.jsonl").read_text()
        losses.append([json.loads(line)["loss"] for line in text.splitlines()])
    assert len(losses[0]) == 12
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-2)


@pytest.mark.usefixtures("small_group")
def test_a_finished_seed_is_not_trained_again(tmp_path: Path, images: Path) -> None:
    run = write_run(tmp_path / "run", images)
    first = evaluate_here(EVALUATOR, run, SMALL)
    folder = run / "finetune-50pct"
    (folder / "results.json").unlink()  # as if the process had ended before it wrote the results
    (folder / "seed-7" / "results.json").unlink()
    second = evaluate_here(EVALUATOR, run, SMALL)
    assert second["seeds"][0] == first["seeds"][0]
    assert second["top1"] == first["top1"]


@pytest.mark.parametrize("model", [NARROW, DROPPED], ids=["resnet", "stochastic depth"])
@pytest.mark.usefixtures("small_group")
def test_it_continues_after_a_stop(tmp_path: Path, images: Path, model: dict[str, Any]) -> None:
    """The stop file exists before the evaluation starts."""
    interrupted, uninterrupted = (write_run(tmp_path / name, images, model=model) for name in ("cut", "whole"))
    folder = interrupted / "finetune-50pct"
    folder.mkdir()
    (folder / "stop").touch()
    with pytest.raises(Stopped, match=r"stopped after step 2 \(asked by file\)"):
        evaluate_here(EVALUATOR, interrupted, SMALL)
    assert json.loads((folder / "stopped.json").read_text())["step"] == 2
    results = [evaluate_here(EVALUATOR, run, SMALL) for run in (interrupted, uninterrupted)]
    assert results[0]["seeds"][0]["top1"] == results[1]["seeds"][0]["top1"]
    losses = [
        [json.loads(line)["loss"] for line in (run / "finetune-50pct/seed-0/metrics.jsonl").read_text().splitlines()]
        for run in (interrupted, uninterrupted)
    ]
    assert losses[0] == losses[1]
    assert not (folder / "stopped.json").exists()


def test_the_mean_and_the_deviation() -> None:
    """The sample deviation of 0.5, 0.6 and 0.7 is 0.1: two degrees of freedom, not three."""
    results = [{"seed": i, "top1": x, "top5": 1.0, "images": 9, "unreadable": 1} for i, x in enumerate((0.5, 0.6, 0.7))]
    summary = summarise(results)
    assert summary["top1"] == pytest.approx(0.6)
    assert summary["top1_deviation"] == pytest.approx(0.1)
    assert summary["top5_deviation"] == 0
    assert (summary["images"], summary["unreadable"]) == (9, 1)


@pytest.mark.parametrize("model", [NARROW, VIT], ids=["resnet", "vit"])
def test_learning_rates_of_layers(model: dict[str, Any]) -> None:
    encoder = Encoder(**model)
    network = Classifier(encoder, 3, frozen=False, seed=0)
    found = parameter_groups(network, Settings(layer_decay=0.5, head_lr=10, weight_decay=0.1))
    assert sum(p.numel() for group in found for p in group["params"]) == sum(p.numel() for p in network.parameters())
    scales = {id(p): group["lr_scale"] for group in found for p in group["params"]}
    backbone = [scales[id(p)] for p in network.backbone.parameters()]
    assert backbone[0] == min(backbone) < 0.3
    assert max(backbone) == 1
    assert scales[id(network.head.weight)] == 10
    decays = {id(p): group["weight_decay"] for group in found for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim > 1 else 0) for p in network.backbone.parameters() if p.ndim != 3)
    even = parameter_groups(network, Settings())
    assert {group["lr_scale"] for group in even} == {1.0}


def test_the_rates_reach_the_optimizer() -> None:
    network = Classifier(Encoder(**NARROW), 3, frozen=False, seed=0)
    found = parameter_groups(network, Settings(layer_decay=0.1, head_lr=2.0))
    optimizer = Sgd(found, lr=1.0)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    update(optimizer, torch.tensor(1.0), None, None, 0.5)
    moved = {name: float((before[name] - p.detach()).mean()) for name, p in network.named_parameters()}
    assert moved["head.weight"] == pytest.approx(1.0)
    assert moved["backbone.layer4.0.conv1.weight"] == pytest.approx(0.5)
    assert moved["backbone.conv1.weight"] < 0.01


def test_invalid_seeds() -> None:
    for seeds in ([], [1, 1], [-1]):
        with pytest.raises(ValueError, match="need different numbers from 0 on"):
            Config.model_validate(
                {"run": {"dir": "x", "epochs": 1}, "data": {"train": "x"}, "finetune": {"seeds": seeds}}
            )
