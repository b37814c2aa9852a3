"""The linear probe beside the encoder: what it computes, on several ranks, and that the encoder does not notice it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.encoder import Encoder
from tests.processes import Program
from tests.ranks import run_ranks
from tests.trainer.small import small_config, write_images
from trainer.evaluate.features import Features
from trainer.evaluate.online_probe import OnlineProbe, make_probe
from trainer.pretrain import pretrain
from trainer.report.run import write_report
from trainer.run import checkpoint
from trainer.run.results import read_rows

CLASSES, STEPS, BATCH, VIEWS = 4, 150, 24, 2
GOOD = torch.ones(())


def features_of(step: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return features [VIEWS, BATCH, 16] with a large common mean, as behind a ReLU, and labels [BATCH]."""
    generator = torch.Generator().manual_seed(0)
    centers_CF = torch.randn(CLASSES, 16, generator=generator)
    generator.manual_seed(step + 1)
    labels_B = torch.randint(CLASSES, (BATCH,), generator=generator)
    noise_VBF = torch.randn(VIEWS, BATCH, 16, generator=generator)
    return scale * (4 + centers_CF[labels_B] + 0.5 * noise_VBF), labels_B


def make_encoder() -> Encoder:
    return Encoder("resnet18", backbone_args={"channels": [8, 8, 8, 16]}, dim=16)


def make() -> OnlineProbe:
    return OnlineProbe(make_encoder(), CLASSES, torch.device("cpu"))


def train(probe: OnlineProbe, steps: range, scale: float = 1.0) -> list[float]:
    """Train on this rank's share of each batch; returns the accuracies before each update."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    found = []
    for step in steps:
        x_VBF, labels_B = features_of(step, scale)
        probe.student.features_NF = x_VBF[:, mine].flatten(0, 1)
        found.append(float(probe.step(labels_B[mine], GOOD)["probe_top1"]))
    return found


def test_accuracy(probe: OnlineProbe) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x_VBF, labels_B = features_of(10_000)
    rows = F.normalize(x_VBF[0], dim=1)[rank::world_size]
    return probe.accuracy(Features(rows, labels_B[rank::world_size], torch.arange(len(rows))))


test_accuracy.__test__ = False  # type: ignore[attr-defined]


def trained(steps: int) -> tuple[dict[str, Tensor], list[float], float]:
    probe = make()
    accuracies = train(probe, range(steps))
    return probe.state_dict(), accuracies, test_accuracy(probe)


def test_ranks_compute_what_one_rank_does() -> None:
    ((expected, single, accuracy),) = run_ranks(1, trained, 20)
    ranks = run_ranks(2, trained, 20)
    for tensors, _, own in ranks:
        for name, x in expected.items():
            torch.testing.assert_close(tensors[name], x, rtol=1e-4, atol=1e-6)
        assert own == pytest.approx(accuracy)
    assert torch.equal(ranks[0][0]["weight"], ranks[1][0]["weight"])
    means = [sum(pair) / 2 for pair in zip(ranks[0][1], ranks[1][1], strict=True)]
    assert means == pytest.approx(single)


@pytest.mark.usefixtures("small_group")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_learns_whatever_the_scale_of_the_features(scale: float) -> None:
    probe = make()
    accuracies = train(probe, range(STEPS), scale)
    assert accuracies[0] < 0.6
    assert sum(accuracies[-20:]) / 20 > 0.95
    assert test_accuracy(probe) > 0.95


@pytest.mark.usefixtures("small_group")
def test_a_step_is_sgd_with_momentum_on_standardised_features() -> None:
    probe = make()
    train(probe, range(3))
    before = {name: x.double() for name, x in probe.state_dict().items()}
    x_VBF, labels_B = features_of(3)
    train(probe, range(3, 4))
    x_NF, labels_N = F.normalize(x_VBF.flatten(0, 1).double(), dim=1), labels_B.repeat(VIEWS)
    moments = before["moments"] * 3 / 4 + torch.stack([x_NF.mean(0), x_NF.square().mean(0)]) / 4
    z_NF = (x_NF - moments[0]) / (16 * (moments[1] - moments[0] ** 2)).sqrt()
    weight = before["weight"].requires_grad_()
    F.cross_entropy(z_NF @ weight[:, :-1].T + weight[:, -1], labels_N).backward()
    assert weight.grad is not None
    velocity = 0.9 * before["velocity"] + weight.grad
    torch.testing.assert_close(probe.tensors["velocity"].double(), velocity, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(probe.tensors["weight"].double(), weight.detach() - velocity, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("small_group")
def test_a_failed_step_changes_nothing() -> None:
    probe = make()
    train(probe, range(3))
    before = probe.state_dict()
    probe.student.features_NF = torch.full((VIEWS * BATCH, 16), torch.nan)
    probe.step(features_of(0)[1], torch.tensor(torch.nan))
    assert before.keys() == probe.tensors.keys()
    assert all(torch.equal(before[name], x) for name, x in probe.tensors.items())


@pytest.mark.usefixtures("small_group")
@pytest.mark.parametrize(
    ("wanted", "classes", "made"), [(None, 1, False), (None, 2, True), (None, 5000, False), (True, 5000, True)]
)
def test_where_it_is_made(tmp_path: Path, wanted: bool | None, classes: int, made: bool) -> None:
    config = small_config(tmp_path, tmp_path, eval={"probe": wanted})
    student = make_encoder()
    assert (make_probe(config, classes, student, torch.device("cpu")) is not None) == made == student.keeps_features


def test_one_class_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, tmp_path / "images", eval={"probe": True})
    with pytest.raises(ValueError, match=r"eval\.probe: need images of at least two classes; .*images has one"):
        make_probe(config, 1, make_encoder(), torch.device("cpu"))


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"optim": {"lr": 0.5, "accumulate": 2}}, id="ddp, micro-batches"),
        pytest.param({"engine": {"kind": "fsdp"}}, id="fsdp", marks=pytest.mark.slow),
        pytest.param({"engine": {"kind": "deepspeed", "stage": 3}}, id="zero-3", marks=pytest.mark.slow),
    ],
)
def test_the_encoder_does_not_notice_it(tmp_path: Path, sections: dict[str, dict[str, Any]]) -> None:
    """Runs with and without the probe have the same weights to the bit. The one with it logs its accuracies."""
    images = write_images(tmp_path / "images", each=8)
    weights = []
    for probe in (True, False):
        run = tmp_path / f"probe-{probe}"
        settings = {"knn_every": 1, "k": 5, "probe": probe}
        program = Program(pretrain, small_config(run, images, run={"epochs": 2}, **sections, eval=settings))
        assert program.wait() == 0, program.errors
        weights.append(load_file(run / "checkpoints/step-00000004/weights.safetensors"))
        rows, results = read_rows(run / "metrics.jsonl"), json.loads((run / "results.json").read_text())
        training, evaluated = ([row for row in rows if key in row] for key in ("loss", "knn"))
        assert {"probe_top1" in row for row in training} == {"probe" in row["phases"] for row in training} == {probe}
        assert {"probe_val_top1" in row for row in evaluated} == {probe}
        assert results.get("probe_val_top1") == evaluated[-1].get("probe_val_top1")
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    assert "Linear probe" in write_report(tmp_path / "probe-True").read_text()


@pytest.mark.slow
def test_a_compiled_encoder_keeps_its_features() -> None:
    encoder, views = make_encoder(), [torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)]
    encoder.keeps_features = True
    encoder(views)
    expected, encoder.features_NF = encoder.features_NF, None
    torch.compile(encoder, backend="aot_eager", fullgraph=True)(views)
    assert expected is not None
    assert not expected.requires_grad
    torch.testing.assert_close(encoder.features_NF, expected)


@pytest.mark.slow
def test_a_checkpoint_without_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run may get the probe later, and do without it again."""
    images, run = write_images(tmp_path / "images", each=8), tmp_path / "run"
    for probe, step, starts_anew in ((False, 2, False), (True, 4, True), (True, 4, False), (False, None, False)):
        pretrain(small_config(run, images, run={"save_every": 2}, eval={"knn_every": 0, "k": 5, "probe": probe}))
        assert ("the linear probe starts anew: checkpoint" in capfd.readouterr().err) == starts_anew
        if step:  # continue after this step
            (run / "results.json").unlink()
            for path in (run / "checkpoints").iterdir():
                if checkpoint.step_of(path) > step:
                    shutil.rmtree(path)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if "probe_top1" in row] == [3, 4]
