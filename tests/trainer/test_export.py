"""Exported networks give the same features in the programs that they are exported for."""

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from models import method
from tests.trainer.small import VIT, small_config, write_images
from trainer.__main__ import main
from trainer.distributed import process_group
from trainer.interop.export import SUFFIXES, export
from trainer.interop.import_ import import_weights
from trainer.interop.layouts import to_detectron2
from trainer.interop.model_card import model_card
from trainer.interop.weights import NEWEST, CheckpointChoice, load_encoder
from trainer.pretrain import pretrain
from trainer.run.directory import read_config

SIDE = 32  # pixels


def imported(folder: Path, backbone: str, *overrides: str) -> Path:
    """Imports a timm network with random weights and random BatchNorm statistics; returns the run directory."""
    torch.manual_seed(0)
    file, run = folder / "made.pth", folder / backbone
    arguments = yaml.safe_load(dict(text.split("=", 1) for text in overrides).get("model.backbone_args", "{}"))
    network = timm.create_model(backbone, num_classes=0, **arguments)
    with torch.no_grad():
        network.train()(torch.randn(4, 3, SIDE, SIDE))
    torch.save(network.state_dict(), file)
    import_weights(file, run, backbone, [f"eval.size={SIDE}", "run.device=cpu", *overrides])
    return run


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("resnet"), "resnet18")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arguments = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": SIDE}
    return imported(
        tmp_path_factory.mktemp("vit"), "vit_tiny_patch16_224", f"model.backbone_args={json.dumps(arguments)}"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT trained for two steps on images of 16 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "images", each=8)
    sections: dict[str, dict[str, Any]] = {
        "run": {"epochs": 1, "save_every": 2},
        "model": VIT,
        "eval": {"knn_every": 0},
    }
    pretrain(small_config(folder / "run", images, **sections))
    return folder / "run"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def ours(run: Path, x_BCHW: Tensor, network: Any = "student") -> Tensor:
    with process_group("cpu"), torch.no_grad():
        encoder, _ = load_encoder(run, read_config(run), CheckpointChoice(network))
        x_BD: Tensor = encoder.backbone.eval()(x_BCHW)
    return x_BD


@torch.no_grad()
def check(network: nn.Module, run: Path, x_BCHW: Tensor) -> None:
    torch.testing.assert_close(network.eval()(x_BCHW), ours(run, x_BCHW), rtol=1e-5, atol=1e-5)


def test_timm(resnet18: Path, tmp_path: Path, images: Tensor) -> None:
    usage = export(resnet18, "timm", tmp_path / "a.safetensors", NEWEST, "unknown")
    (how,) = re.findall(r"timm\.create_model\(.*\)", usage)
    check(eval(how, {"timm": timm}), resnet18, images)
    again = tmp_path / "again"
    import_weights(tmp_path / "a.safetensors", again, "resnet18", [])
    assert torch.equal(ours(again, images), ours(resnet18, images))


@pytest.mark.parametrize(
    ("backbone", "side", "small_images"),
    [
        ("vit_tiny_patch16_224", 64, False),  # as DINOv2's positions are for 518 pixels, and images have 224
        ("vit_tiny_patch16_224", 64, True),
        ("vit_pe_core_tiny_patch16_384", 64, True),  # another class than VisionTransformer
        ("vit_relpos_small_patch16_224", SIDE, True),  # of a fixed size
    ],
)
def test_vits_for_images_of_the_evaluated_size(
    tmp_path: Path, images: Tensor, backbone: str, side: int, small_images: bool
) -> None:
    """The printed call has what the encoder adds to the arguments of the configuration."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": side}
    patch_size = {"patch_size": 4} if small_images else {}
    torch.save(timm.create_model(backbone, num_classes=0, **arguments, **patch_size).state_dict(), tmp_path / "a.pth")
    given = [f"model.backbone_args={json.dumps(arguments)}", f"model.small_images={json.dumps(small_images)}"]
    run = tmp_path / "run"
    import_weights(tmp_path / "a.pth", run, backbone, [f"eval.size={SIDE}", "run.device=cpu", *given])
    usage = export(run, "timm", tmp_path / "a.safetensors", NEWEST, "unknown")
    (how,) = re.findall(r"timm\.create_model\(.*\)", usage)
    check(eval(how, {"timm": timm}), run, images)
    export(run, "huggingface", tmp_path / "folder", NEWEST, "unknown")
    check(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True), run, images)


def test_torchvision(resnet18: Path, vit: Path, tmp_path: Path, images: Tensor) -> None:
    export(resnet18, "torchvision", tmp_path / "resnet.safetensors", NEWEST, "unknown")
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(load_file(tmp_path / "resnet.safetensors"))
    check(network, resnet18, images)

    export(vit, "torchvision", tmp_path / "vit.safetensors", NEWEST, "unknown")
    network = torchvision.models.VisionTransformer(SIDE, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128)
    network.heads = nn.Identity()
    network.load_state_dict(load_file(tmp_path / "vit.safetensors"))
    check(network, vit, images)


def detectron2_names(depth: int) -> set[str]:
    """Returns the parameters of detectron2's ResNet-18 or 50 in a Faster R-CNN C4, whose head has the last stage."""
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    convs = [("backbone.stem.conv1")]
    for stage, count in enumerate(blocks, start=2):
        where = "roi_heads.res5" if stage == 5 else f"backbone.res{stage}"
        for block in range(count):
            convs += [f"{where}.{block}.conv{i}" for i in range(1, 4 if depth == 50 else 3)]
            if block == 0 and (depth == 50 or stage > 2):
                convs.append(f"{where}.{block}.shortcut")
    norms = ("weight", "bias", "running_mean", "running_var")
    names = {f"{conv}.weight" for conv in convs} | {f"{conv}.norm.{name}" for conv in convs for name in norms}
    return names | {"roi_heads.res5.norm.weight", "proposal_generator.rpn_head.conv.weight", "pixel_mean"}


def align(model: set[str], stored: set[str]) -> dict[str, str]:
    """Matches names by the longest suffix as detectron2 does (checkpoint/c2_model_loading.py), each once."""
    matches: dict[str, str] = {}
    for name in sorted(model):
        fitting = [key for key in stored if name == key or name.endswith("." + key)]
        if fitting:
            key = max(fitting, key=len)
            assert key not in matches.values(), f"{key} is ambiguous"
            matches[name] = key
    return matches


def check_names(depth: int, stored: set[str]) -> dict[str, str]:
    matches = align(detectron2_names(depth), stored)
    assert set(matches.values()) == stored, "every stored array is used"
    new = {"roi_heads.res5.norm.weight", "proposal_generator.rpn_head.conv.weight", "pixel_mean"}
    assert detectron2_names(depth) - set(matches) == new, "only the parameters of the detector have no stored array"
    return matches


def test_detectron2_names_of_a_resnet50() -> None:
    with torch.device("meta"):
        names = timm.create_model("resnet50", num_classes=0).state_dict()
    check_names(50, {to_detectron2(name) for name in names if "num_batches" not in name})


def test_detectron2(resnet18: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pkl"
    usage = export(resnet18, "detectron2", out, NEWEST, "unknown")
    assert "STRIDE_IN_1X1 False" in usage
    assert b"_core" not in out.read_bytes(), "numpy 1 has no module numpy._core"
    with out.open("rb") as file:
        stored = pickle.load(file, encoding="latin1")  # as DetectionCheckpointer does
    assert stored["matching_heuristics"] is True
    assert stored["__author__"] == "AdCo trainer"
    weights = stored["model"]
    assert all(type(x) is np.ndarray and x.dtype == np.float32 and x.flags.writeable for x in weights.values())
    matches = check_names(18, set(weights))
    theirs = load_file(resnet18 / "weights.safetensors")
    for name, of in {
        "backbone.stem.conv1.norm.bias": "bn1.bias",
        "backbone.res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "backbone.res4.0.shortcut.norm.running_var": "layer3.0.downsample.1.running_var",
        "roi_heads.res5.1.conv2.norm.running_mean": "layer4.1.bn2.running_mean",
    }.items():
        assert np.array_equal(weights[matches[name]], theirs[f"student.backbone.{of}"].numpy())


@pytest.mark.parametrize("fixture", [pytest.param("resnet18", marks=pytest.mark.slow), "trained"])
def test_onnx(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run, out = request.getfixturevalue(fixture), tmp_path / "a.onnx"
    side = SIDE if fixture == "resnet18" else 16
    export(run, "onnx", out, NEWEST, "unknown")
    onnx.checker.check_model(str(out))
    assert {entry.key for entry in onnx.load(out).metadata_props} >= {"mean", "std"}
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, side, side]
    for batch in (1, 5):
        x_BCHW = torch.randn(batch, 3, side, side)
        (found,) = session.run(["features"], {"images": x_BCHW.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), ours(run, x_BCHW), rtol=1e-5, atol=1e-5)


def test_a_folder_for_hugging_face(resnet18: Path, vit: Path, trained: Path, tmp_path: Path, images: Tensor) -> None:
    for run, x_BCHW in ((resnet18, images), (vit, images), (trained, images[:, :, :16, :16])):
        out = tmp_path / f"{run.name}-hf"
        export(run, "huggingface", out, NEWEST, "apache-2.0")
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        network = timm.create_model(f"local-dir:{out}", pretrained=True)
        check(network, run, x_BCHW)
        data = timm.data.resolve_model_data_config(network)
        assert data["input_size"] == (3, *x_BCHW.shape[2:])
        assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
        import_weights(out, tmp_path / f"{run.name}-again", None, [])
        assert torch.equal(ours(tmp_path / f"{run.name}-again", x_BCHW), ours(run, x_BCHW))
        assert json.loads((out / "config.json").read_text())["pretrained_cfg"].keys().isdisjoint({"tag", "hf_hub_id"})


def test_the_model_card(resnet18: Path, trained: Path, tmp_path: Path) -> None:
    cards = []
    for run in (resnet18, trained):
        export(run, "huggingface", tmp_path / run.name, NEWEST, "cc-by-4.0")
        text = (tmp_path / run.name / "README.md").read_text(encoding="utf-8")
        _, front, text = text.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "cc-by-4.0"
        assert yaml.safe_load(front)["library_name"] == "timm"
        assert "{{" not in text
        cards.append(text)
    assert "imported from the file `made.pth`" in cards[0]
    assert "Pre-trained" not in cards[0]
    assert "arxiv" not in cards[0], "the papers of the weights are unknown"
    assert "See the source of the file for authors, training,\nlicence and citation." in cards[0]
    assert "Pre-trained with the method `adco`" in cards[1]
    assert "after 2 steps" in cards[1]
    assert "| negatives | 30, learning rate 3, temperature 0.02 |" in cards[1]
    assert re.findall(r"arXiv:([\d.]+)", cards[1]) == ["2011.08435"], "of the run's own method only"


def test_the_model_card_of_any_method(trained: Path) -> None:
    """A method needs to be registered in the configuration only; one without papers has no citation."""

    class Settings(method.Settings):
        name: Literal["simsiam"] = "simsiam"

    class Published(Settings):
        papers: ClassVar[tuple[str, ...]] = ("2011.10566",)

    config = read_config(trained)
    with process_group("cpu"):
        encoder, step = load_encoder(trained, config)
    cards = [
        model_card(
            trained, config.model_copy(update={"method": settings}), "student", step, encoder.backbone, 16, "mit"
        )
        for settings in (Settings(), Published())
    ]
    assert all("Pre-trained with the method `simsiam`" in card for card in cards)
    assert not any("| negatives |" in card for card in cards)
    assert "## Citation" not in cards[0]
    assert "https://arxiv.org/abs/2011.10566" in cards[1]
    assert "## Results" in cards[0]
    teacher = model_card(trained, config, "teacher", step, encoder.backbone, 16, "mit")
    assert "## Results" not in teacher, "the results are those of the student"


def test_the_networks_of_a_run(trained: Path, tmp_path: Path, images: Tensor) -> None:
    x_BCHW = images[:, :, :16, :16]
    assert not torch.equal(ours(trained, x_BCHW, "student"), ours(trained, x_BCHW, "teacher"))
    usage = export(trained, "timm", tmp_path / "a.safetensors", CheckpointChoice("teacher"), "unknown")
    assert "the teacher of" in usage
    assert "after 2 steps" in usage
    (how,) = re.findall(r"timm\.create_model\(.*\)", usage)
    network = eval(how, {"timm": timm}).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x_BCHW), ours(trained, x_BCHW, "teacher"), rtol=1e-5, atol=1e-5)


def error_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["trainer", "export", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    return output


def test_what_a_format_cannot_hold(
    vit: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a.safetensors")
    narrow = imported(tmp_path, "resnet18", "model.backbone_args={channels: [8, 8, 8, 16]}")
    output = error_line(monkeypatch, capsys, str(narrow), "--format", "torchvision", "--out", out)
    assert "torchvision's resnet18 is another network: unknown: layer1.0.downsample.0.weight, " in output
    assert "layer1.0.conv1.weight is [8, 64, 3, 3], need [64, 64, 3, 3]" in output
    output = error_line(monkeypatch, capsys, str(vit), "--format", "detectron2", "--out", out)
    assert output == f"error: --out: got {out}, need a name that ends in .pkl for --format detectron2\n"
    pickled, model = str(tmp_path / "a.pkl"), str(tmp_path / "a.onnx")
    output = error_line(monkeypatch, capsys, str(vit), "--format", "detectron2", "--out", pickled)
    assert "detectron2 has ResNets only, the backbone is vit_tiny_patch16_224" in output
    output = error_line(monkeypatch, capsys, str(vit), "--format", "timm", "--out", out, "--network", "teacher")
    assert "has no teacher, only student" in output
    monkeypatch.setattr("trainer.interop.export.ONNX_BYTES", 1000)
    output = error_line(monkeypatch, capsys, str(vit), "--format", "onnx", "--out", model)
    assert "--format onnx: got 0.0 GB of weights, need less than 0.0 GB for one file" in output
    assert not any(Path(path).exists() for path in (out, pickled, model))
    Path(out).write_text("precious")
    output = error_line(monkeypatch, capsys, str(vit), "--format", "timm", "--out", out)
    assert output == f"error: {out} exists: choose another name, nothing is overwritten\n"
    assert Path(out).read_text() == "precious"


def test_a_stem_for_small_images(tmp_path: Path, images: Tensor) -> None:
    folder = tmp_path / "run"
    photos = write_images(tmp_path / "images", each=8)
    model = {
        "backbone": "resnet18",
        "backbone_args": {"channels": [8, 8, 8, 16]},
        "small_images": True,
        "stem_stride": 2,
    }
    pretrain(
        small_config(folder, photos, run={"epochs": 1}, model=model, eval={"knn_every": 0}, bank={"init": "random"})
    )
    for to, who in (("torchvision", "torchvision"), ("detectron2", "torchvision"), ("huggingface", "Hugging Face")):
        out = tmp_path / f"a{SUFFIXES.get(to, '')}"
        with pytest.raises(ValueError, match=rf"{who}.* has no ResNet with a stem for small images .*stem_stride 2"):
            export(folder, to, out, NEWEST, "unknown")  # type: ignore[arg-type]
    usage = export(folder, "timm", tmp_path / "a.safetensors", NEWEST, "unknown")
    assert "once its conv1 is nn.Conv2d(3, conv1.out_channels, 3, 2, padding=1, bias=False)" in usage
    network = timm.create_model("resnet18", num_classes=0, channels=[8, 8, 8, 16])
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, 2, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.load_state_dict(load_file(tmp_path / "a.safetensors"))
    check(network, folder, images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "images", "run"]
