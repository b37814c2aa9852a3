"""Pre-training that starts from released weights: a folder of timm's format, a frozen backbone, rates by layer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoder import Encoder
from tests.trainer.foreign import narrow_resnet
from tests.trainer.small import RESNET, small_config, write_images
from trainer.config import Config
from trainer.distributed import process_group
from trainer.engines.optim import Optim, make_optimizer
from trainer.interop.export import export
from trainer.interop.import_ import import_weights
from trainer.interop.weights import NEWEST, CheckpointChoice, load_encoder
from trainer.pretrain import pretrain
from trainer.report.run import write_report
from trainer.run.results import read_rows


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face has it, with config.json and model.safetensors."""
    folder = tmp_path_factory.mktemp("released")
    torch.save({"arch": "resnet18", "state_dict": narrow_resnet(1).state_dict()}, folder / "a.pth")
    import_weights(folder / "a.pth", folder / "run", "resnet18", ["run.device=cpu"], ["channels=[8, 8, 8, 16]"])
    export(folder / "run", "huggingface", folder / "timm", NEWEST, "unknown")
    return folder / "timm"


def config_for(folder: Path, weights: Path, **sections: dict[str, Any]) -> Config:
    images = folder.parent / "images"
    if not images.exists():
        write_images(images, each=8)
    run = {"epochs": 2, "save_every": 2}
    return small_config(folder, images, run=run, model={**RESNET, "weights": str(weights)}, **sections)


def encoder_at(config: Config, step: int) -> Encoder:
    with process_group("cpu"):
        return load_encoder(Path(config.run.dir), config, CheckpointChoice("student", step))[0]


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"kind": "deepspeed", "stage": 2}, id="zero-2", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_backbone_waits_for_its_head(tmp_path: Path, released: Path, engine: dict[str, Any]) -> None:
    """Two epochs of two steps; the backbone learns in the second one."""
    optim = {"lr": 0.5, "frozen_epochs": 1, "layer_decay": 0.5}
    config = config_for(tmp_path / "run", released, optim=optim, engine=engine)
    pretrain(config)
    initial = narrow_resnet(1)
    frozen, trained = encoder_at(config, 2), encoder_at(config, 4)
    for name, parameter in initial.named_parameters():
        torch.testing.assert_close(frozen.backbone.get_parameter(name), parameter, rtol=0, atol=1e-7)
    assert not torch.equal(trained.backbone.get_parameter("conv1.weight"), initial.get_parameter("conv1.weight"))
    assert not torch.equal(frozen.head.get_parameter("0.weight"), trained.head.get_parameter("0.weight"))
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert [row["backbone_lr"] for row in rows] == [0.0, 0.0, rows[2]["lr"], rows[3]["lr"]]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"knn_initial", "knn"} <= results.keys()
    assert "knn_untrained" not in results
    assert "the initial weights" in write_report(tmp_path / "run").read_text()
    export(tmp_path / "run", "huggingface", tmp_path / "folder", NEWEST, "unknown")
    assert "kNN top-1 of the initial weights" in (tmp_path / "folder/README.md").read_text()


def test_the_weights_are_read_once(tmp_path: Path, released: Path) -> None:
    weights = shutil.copytree(released, tmp_path / "weights")
    config = config_for(tmp_path / "run", weights)
    pretrain(config)
    shutil.rmtree(weights)
    (tmp_path / "run/results.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    elsewhere = config.model.model_copy(update={"weights": str(tmp_path / "moved/weights")})
    pretrain(config.model_copy(update={"model": elsewhere}))
    assert (tmp_path / "run/results.json").exists()
    without = config.model.model_copy(update={"weights": None})
    with pytest.raises(ValueError, match=r"model\.weights was .*, now None"):
        pretrain(config.model_copy(update={"model": without}))


def test_a_failed_import_leaves_nothing_in_the_way(tmp_path: Path, released: Path) -> None:
    weights = shutil.copytree(released, tmp_path / "weights")
    config = config_for(tmp_path / "run", weights)
    (weights / "config.json").rename(weights / "elsewhere")
    with pytest.raises(ValueError, match=r"model\.weights: .*weights is not a timm model of Hugging Face"):
        pretrain(config)
    (weights / "elsewhere").rename(weights / "config.json")
    (tmp_path / "run/initial").mkdir()  # as a start that was killed leaves it
    pretrain(config)
    assert (tmp_path / "run/initial/weights.safetensors").exists()


def test_weights_of_another_network_are_refused(tmp_path: Path, released: Path) -> None:
    config = config_for(tmp_path / "run", released)
    model = config.model.model_copy(update={"backbone_args": {"channels": [8, 8, 8, 32]}})
    with pytest.raises(ValueError, match=r"model\.weights: .*other shapes: .*layer4"):
        pretrain(config.model_copy(update={"model": model}))


@pytest.mark.parametrize(("after", "is_reported"), [(0.5, True), (0.6, False)])
def test_a_lower_accuracy_is_reported(
    after: float,
    is_reported: bool,
    tmp_path: Path,
    released: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The standard error of 0.75 on 24 images is 0.088."""
    accuracies = iter([{"knn": 0.75}, {"knn": after}])
    monkeypatch.setattr("trainer.evaluate.knn.evaluate_pixels", lambda *_: {})
    monkeypatch.setattr("trainer.evaluate.knn.evaluate", lambda *_: next(accuracies))
    pretrain(config_for(tmp_path / "run", released, eval={"knn_every": 0, "k": 5}))
    warning = "kNN fell from 0.7500 with the initial weights to 0.5000 (standard error 0.0884): lower optim.lr or"
    assert (warning in capfd.readouterr().err) == is_reported


def test_a_backbone_is_frozen_only_if_it_has_learned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.frozen_epochs: .* give model\.weights"):
        small_config(tmp_path, tmp_path, optim={"frozen_epochs": 1})


@pytest.mark.parametrize("decay_vectors", [True, False])
@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_rates_fall_from_layer_to_layer(backbone: str, decay_vectors: bool) -> None:
    network = Encoder(backbone, predictor=8)
    settings = Optim(layer_decay=0.5, weight_decay=0.1, decay_norm_and_bias=decay_vectors)
    groups = make_optimizer(network, settings).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    factors, decays = {}, {}
    for group in groups:
        for parameter in group["params"]:
            factors[names[id(parameter)]] = group.get("lr_scale", 1.0)
            decays[names[id(parameter)]] = group["weight_decay"]
    assert factors.keys() == set(names.values()), "every parameter is in one group"
    assert sum(len(group["params"]) for group in groups) == len(names)
    first, *_, last = (name for name, _ in network.backbone.named_parameters())
    assert factors[f"backbone.{first}"] <= 0.5**3
    assert factors[f"backbone.{last}"] == factors["head.0.weight"] == factors["predictor.0.weight"] == 1.0
    assert set(decays.values()) == ({0.1} if decay_vectors else {0.0, 0.1})
