"""The common part of all evaluations: their registration, their directories, and what a new one needs."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.trainer.evaluations import evaluate_here, write_run
from tests.trainer.small import small_config, write_images
from trainer.config_file import dump, load
from trainer.evaluate import knn
from trainer.evaluate.base import EvaluationContext, Evaluator, Results
from trainer.evaluate.registry import EVALUATIONS, Registration, load_evaluator
from trainer.evaluate.run import run_evaluation
from trainer.interop.weights import NEWEST
from trainer.report.compare import read, tabulate
from trainer.report.run import write_report
from trainer.run.files import write_json
from trainer.run.results import read_evaluations


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", write_images(tmp_path / "images", each=8))


@pytest.mark.parametrize("verb", EVALUATIONS)
def test_each_verb_has_an_evaluator_and_takes_a_seed(verb: str, tmp_path: Path) -> None:
    assert isinstance(load_evaluator(verb), Evaluator)
    config = small_config(tmp_path, tmp_path)
    (tmp_path / "config.yaml").write_text(dump(config))
    seeded = load(tmp_path / "config.yaml", EVALUATIONS[verb].overrides(seed=3, fast=False))
    assert (seeded == config) == (verb == "knn"), "kNN draws nothing at random"


@pytest.mark.usefixtures("small_group")
def test_an_evaluation_that_failed_does_not_occupy_its_directory(run: Path) -> None:
    with pytest.raises(ValueError, match=r"give data\.val"):
        evaluate_here(knn.EVALUATOR, run, ["data.val=null"])
    assert evaluate_here(knn.EVALUATOR, run, [])["k"] == 5


@pytest.mark.usefixtures("small_group")
def test_results_of_another_checkpoint_keep_their_directory(run: Path) -> None:
    results = evaluate_here(knn.EVALUATOR, run, [])
    write_json(run / "knn" / "results.json", {**results, "step": 7})
    assert evaluate_here(knn.EVALUATOR, run, []) == results
    assert {name: found["step"] for name, found in read_evaluations(run).items()} == {"knn": 7, "knn-step0": 0}


def test_a_new_evaluation_is_one_file_and_one_registration(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def count_parameters(context: EvaluationContext) -> Results:
        kilo = sum(p.numel() for p in context.encoder.backbone.parameters()) / 1000
        return {"kiloparameters": np.float32(kilo), "count": torch.tensor(3), "labels": "all"}

    module = ModuleType("parameters")
    module.EVALUATOR = Evaluator(lambda config, trained: "size", lambda config: {}, count_parameters)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parameters", module)
    monkeypatch.setitem(EVALUATIONS, "size", Registration("parameters", "Count the parameters of the backbone."))
    run_evaluation("size", run, [], None, NEWEST)
    value = json.loads(capsys.readouterr().out)["kiloparameters"]
    columns, (row,) = tabulate([read(run, [run])])
    assert row[columns.index("size")] == f"kiloparameters {value:.4g}"
    assert f"kiloparameters {value:.4g}" in write_report(run).read_text(encoding="utf-8")
