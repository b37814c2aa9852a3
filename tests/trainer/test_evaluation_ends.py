"""What evaluations do besides their results: they stop in good order, and send curves and results to the trackers."""

import json
from pathlib import Path

import pytest

from tests.trainer.evaluations import evaluate_here, write_run
from tests.trainer.small import write_images
from tests.trainer.test_trackers import wandb_rows
from tests.trainer.test_voc07 import write_voc
from trainer.evaluate.registry import load_evaluator
from trainer.ops.stop import Stopped

pytestmark = pytest.mark.usefixtures("small_group")

FAST = ["linear.fast=true", "fast.epochs=1", "fast.lrs=[1]", "fast.weight_decays=[0]", "fast.crops=0"]
LINEAR = ["linear.epochs=1", "linear.batch_size=12", "linear.lr=1"]
FINETUNE = ["finetune.labels=0.5", "finetune.seeds=[3]", "finetune.epochs=1", "finetune.batch_size=12"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train", each=12)


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Path:
    return write_run(tmp_path / "run", images, run={"dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"})


@pytest.mark.parametrize(
    ("verb", "settings", "reason"),
    [
        ("knn", [], "asked by file"),
        ("knn", ["run.max_minutes=0.01"], "out of time"),
        ("linear", FAST, "asked by file"),
        pytest.param("voc07", ["voc07.costs=[1]"], "asked by file", marks=pytest.mark.slow),
    ],
)
def test_what_has_no_steps_stops_and_starts_again(
    run: Path, tmp_path: Path, verb: str, settings: list[str], reason: str
) -> None:
    if verb == "voc07":
        settings = [*settings, f"voc07.root={write_voc(tmp_path / 'voc', each=16)}"]
    folder = run / ("linear-fast" if verb == "linear" else verb)
    folder.mkdir()
    if reason == "asked by file":
        (folder / "stop").touch()
    with pytest.raises(Stopped, match=rf"stopped \({reason}\)"):
        evaluate_here(load_evaluator(verb), run, settings)
    assert json.loads((folder / "stopped.json").read_text())["reason"] == reason
    assert not (folder / "stop").exists()
    assert not (folder / "results.json").exists()
    evaluate_here(load_evaluator(verb), run, [text for text in settings if "max_minutes" not in text])
    assert (folder / "results.json").exists()
    assert not (folder / "stopped.json").exists()


@pytest.mark.parametrize(
    ("verb", "settings", "curve", "result"),
    [
        ("knn", [], None, "knn"),
        ("linear", LINEAR, "linear", "top1"),
        ("finetune", FINETUNE, "finetune-50pct/seed-3", "top1"),
    ],
)
def test_curves_and_results_reach_the_trackers(
    run: Path, monkeypatch: pytest.MonkeyPatch, verb: str, settings: list[str], curve: str | None, result: str
) -> None:
    """In the W&B run of the run, under the name of the evaluation's directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    prometheus = run / "values.prom"
    monitor = ["monitor.wandb=project", f"monitor.prometheus={prometheus}", "run.log_every=1"]
    results = evaluate_here(load_evaluator(verb), run, [*settings, *monitor])
    name = "finetune-50pct" if verb == "finetune" else verb
    steps = {"knn": 0, "linear": 3, "finetune": 1}[verb]
    rows = wandb_rows(run, 1 + steps)
    (sent,) = (row for row in rows if f"{name}/results/{result}" in row)
    assert float(sent[f"{name}/results/{result}"]) == results[result]
    assert sent[f"{name}/step"] == "0"
    losses = [row[f"{curve}/loss"] for row in rows if f"{curve}/loss" in row]
    assert len(losses) == steps
    run_id = (run / "wandb" / "id").read_text()
    assert {path.name.split("-")[-1] for path in run.glob("wandb/offline-run-*")} == {run_id}
    assert list((run / name).glob("tensorboard/*"))
    text = (run / f"values-{name}.prom").read_text()
    assert f'adco_results_{result}{{run="{run / name}"}}' in text
    assert not prometheus.exists(), "it is that of training"


def test_a_tracker_that_fails_does_not_end_an_evaluation(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = evaluate_here(load_evaluator("knn"), run, [f"monitor.prometheus={run}/nowhere/values.prom"])
    assert "knn" in results
    assert caplog.text.count("Prometheus does not get the results of") == 1
