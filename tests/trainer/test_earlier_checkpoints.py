"""Checkpoints of earlier steps: evaluation and export with --step, and their curves in compare and report."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.trainer.small import small_config, write_images
from trainer.__main__ import app, main
from trainer.pretrain import pretrain
from trainer.report.compare import charts, read, tabulate
from trainer.run.results import evaluation_rows, read_evaluations, read_rows

FAST = ["--fast", "fast.batch_size=16", "fast.epochs=2", "fast.lrs=[1]", "fast.weight_decays=[0]", "fast.crops=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 18 steps, with the checkpoints of steps 6, 12 and 18."""
    folder = tmp_path_factory.mktemp("run")
    images = write_images(folder / "images")
    pretrain(small_config(folder / "run", images, run={"epochs": 3, "keep_every": 1, "save_every": 100, "keep": 1}))
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == [
        "step-00000006", "step-00000012", "step-00000018",
    ]  # fmt: skip
    return folder / "run"


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


def test_knn_of_each_is_that_of_its_epoch(run: Path) -> None:
    said = [json.loads(command("knn", run, "--step", str(step))) for step in (6, 12, 18)]
    logged = {row["step"]: row["knn"] for row in read_rows(run / "metrics.jsonl") if "knn" in row}
    assert [(row["step"], row["knn"]) for row in said] == [(step, logged[step]) for step in (6, 12, 18)]
    assert json.loads(command("knn", run)) == said[2]


def test_linear_of_several(run: Path) -> None:
    found = [json.loads(command("linear", run, *FAST, *step)) for step in (["--step", "6"], [], ["--step", "12"])]
    assert [results["step"] for results in found] == [6, 18, 12]
    found_linear = {name for name in read_evaluations(run) if not name.startswith("knn")}
    assert found_linear == {"linear-fast-step6", "linear-fast", "linear-fast-step12"}

    compared = read(run, [run])
    (row,) = tabulate([compared])[1]
    columns = tabulate([compared])[0]
    assert row[columns.index("linear-fast")] == f"{100 * found[1]['top1']:.1f} %", "of the newest"
    assert not [column for column in columns if "step" in column]
    drawn = {chart["id"]: chart["lines"] for chart in charts([compared])}
    assert [f"{name}-{x}" for name in ("knn", "linear-fast") for x in ("epoch", "images", "hours")] == list(drawn)
    assert drawn["linear-fast-epoch"][0]["x"] == [1, 2, 3]
    assert drawn["linear-fast-images"][0]["x"] == [72, 144, 216]
    accuracies = [found[i]["top1"] for i in (0, 2, 1)]
    assert drawn["linear-fast-hours"][0]["y"] == pytest.approx(accuracies, abs=1e-6)

    command("report", run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert '"title": "Linear accuracy"' in html
    assert "checkpoint of step 12" in html


def test_one_evaluation_is_no_curve() -> None:
    rows = [{"step": 6 * i, "epoch": float(i), "images": 72 * i, "seconds": 10.0 * i} for i in range(4)]
    found = {
        "linear": {"top1": 0.5, "step": 18},
        "voc07": {"map": 0.3, "step": 18},
        "voc07-step9": {"map": 0.2, "step": 9},
    }
    assert evaluation_rows(rows, found) == [
        {"step": 9, "epoch": 1.5, "images": 108.0, "seconds": 15.0, "voc07": 0.2},
        {"step": 18, "epoch": 3.0, "images": 216.0, "seconds": 30.0, "voc07": 0.3},
    ]
    assert evaluation_rows([{"step": 3, "loss": 1.0}], found) == [], "nowhere to put them"


def test_export_of_each(run: Path, tmp_path: Path) -> None:
    weights = []
    for step in (6, 18):
        command("export", run, "--format", "huggingface", "--out", tmp_path / f"{step}", "--step", str(step))
        weights.append(load_file(tmp_path / f"{step}" / "model.safetensors")["layer4.1.conv2.weight"])
        saved = load_file(run / f"checkpoints/step-{step:08d}/weights.safetensors")
        assert torch.equal(weights[-1], saved["student.backbone.layer4.1.conv2.weight"])
    assert not torch.equal(*weights)
    card = {step: (tmp_path / step / "README.md").read_text(encoding="utf-8") for step in ("6", "18")}
    assert "after 6 steps" in card["6"]
    assert "kNN top-1" in card["18"]
    assert "kNN top-1" not in card["6"], "what the run reached at its end is not of this checkpoint"


def test_what_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(*arguments: str) -> str:
        monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
        monkeypatch.setattr("sys.argv", ["trainer", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        return capsys.readouterr().err

    assert "has no checkpoint of step 7, only of 6, 12, 18" in mistake("knn", str(run), "--step", "7")
    weights = run / "checkpoints/step-00000012/weights.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1])
    try:
        assert "step-00000012 is damaged (weights.safetensors has" in mistake("knn", str(run), "--step", "12")
    finally:
        weights.write_bytes(kept)
