"""Imported checkpoints of the official programs give the same features; other files are refused."""

import argparse
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from tests.trainer.foreign import State, ViT, children, fixed_positions, mlp, moco_v3_linear, narrow_resnet, renamed
from tests.trainer.small import RESNET, VIT_ARGS, small_config, write_images
from trainer.__main__ import main
from trainer.config import Config
from trainer.distributed import process_group
from trainer.evaluate.run import run_evaluation
from trainer.interop.export import export
from trainer.interop.import_ import import_weights
from trainer.interop.weights import NEWEST, CheckpointChoice, Network, load_encoder
from trainer.pretrain import pretrain
from trainer.run.directory import read_config
from trainer.run.files import read_json

NARROW = ["model.backbone_args={channels: [8, 8, 8, 16]}", "run.device=cpu"]
TINY_VIT = [f"model.backbone_args={VIT_ARGS}", "run.device=cpu"]


def moco(student: nn.Module, teacher: nn.Module, head: Callable[[str], State]) -> dict[str, Any]:
    """As main_moco.py saves moco/builder.py inside DistributedDataParallel."""
    state = {
        **renamed(student, "module.encoder_q."),
        **head("module.encoder_q.fc."),
        **renamed(teacher, "module.encoder_k."),
        **head("module.encoder_k.fc."),
        "module.queue": torch.randn(16, 32),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    optimizer = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9)
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer.state_dict()}


def moco_v1(student: nn.Module, teacher: nn.Module) -> Any:
    return moco(student, teacher, lambda prefix: mlp(prefix, 16, 12) and {f"{prefix}weight": torch.randn(12, 16)})


def adco(student: nn.Module, teacher: nn.Module) -> Any:
    """As training/main_worker.py saves it."""
    saved = moco(student, teacher, lambda prefix: mlp(prefix, 16, 16, 12))
    del saved["state_dict"]["module.queue"], saved["state_dict"]["module.queue_ptr"]
    bank = {"W": torch.randn(12, 64), "v": torch.zeros(12, 64)}
    return {**saved, "best_acc": torch.tensor(56.0), "Memory_Bank": bank}


def moco_v3(student: nn.Module, teacher: nn.Module) -> Any:
    state = {
        **renamed(student, "module.base_encoder."),
        **mlp("module.base_encoder.fc.", 16, 20, 12),
        **renamed(teacher, "module.momentum_encoder."),
        **mlp("module.predictor.", 12, 20, 12),
    }
    state = {name.replace("fc.0.bias", "fc.1.bias"): x for name, x in state.items()}  # BatchNorm between
    return {"epoch": 1000, "arch": "resnet18", "state_dict": state, "scaler": {"scale": 65536.0}}


def dino(student: nn.Module, teacher: nn.Module) -> Any:
    """As main_dino.py saves it: arguments as a Namespace, learning rates as numpy scalars."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=np.float64(0.0005), weight_decay=np.float64(0.04))
    return {
        "student": {**renamed(student, "module.backbone."), **mlp("module.head.mlp.", 16, 20, 12)},
        "teacher": {**renamed(teacher, "backbone."), **mlp("head.mlp.", 16, 20, 12)},
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="resnet18", patch_size=16, lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 12)},
    }


def byol_lucidrains(student: nn.Module, teacher: nn.Module) -> Any:
    return {
        **renamed(student, "net."),
        **renamed(student, "online_encoder.net."),
        **mlp("online_encoder.projector.", 16, 20, 12),
        **renamed(teacher, "target_encoder.net."),
        **mlp("target_encoder.projector.", 16, 20, 12),
        **mlp("online_predictor.", 12, 20, 12),
    }


def byol_yaox12(student: nn.Module, teacher: nn.Module) -> Any:
    state = {
        **children(student, "module.online_network.encoder."),
        **mlp("module.online_network.projetion.l", 16, 20, 12),
        **children(teacher, "module.target_network.encoder."),
        **mlp("module.predictor.predictor.l", 12, 20, 12),
    }
    return {"config": {"model": {"backbone": "resnet18"}}, "epoch": 3, "steps": 9, "model": state, "amp": {}}


def byol_sthalles(student: nn.Module, teacher: nn.Module) -> Any:
    return {
        "online_network_state_dict": {**children(student, "encoder."), **mlp("projetion.net.", 16, 20, 12)},
        "encoder_state_dict": children(student, ""),
        "target_network_state_dict": {**children(teacher, "encoder."), **mlp("projetion.net.", 16, 20, 12)},
        "optimizer_state_dict": {},
    }


def simclr_sthalles(student: nn.Module, teacher: nn.Module) -> Any:
    state = {**renamed(student, "backbone."), **mlp("backbone.fc.", 16, 16, 12)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}


def simclr_spijkervet(student: nn.Module, teacher: nn.Module) -> Any:
    return {
        **renamed(student, "encoder."),
        "projector.0.weight": torch.ones(16, 16),
        "projector.2.weight": torch.ones(12, 16),
    }


def torchvision_resnet(student: nn.Module, teacher: nn.Module) -> Any:
    old = {name: x for name, x in student.state_dict().items() if "num_batches" not in name}  # before PyTorch 0.4.1
    return {**old, "fc.weight": torch.ones(1000, 16), "fc.bias": torch.ones(1000)}


# The layout's name, whether there is a teacher, whether the head is imported, and some of the tensors left out.
OFFICIAL: list[tuple[Callable[[nn.Module, nn.Module], Any], str, bool, bool, list[str]]] = [
    (moco_v1, "MoCo v1, v2 or AdCo", True, False, ["queue", "queue_ptr", "encoder_q.fc.weight", "encoder_k.fc.weight"]),
    (adco, "MoCo v1, v2 or AdCo", True, True, []),
    (moco_v3, "MoCo v3", True, False, ["predictor.2.bias", "base_encoder.fc.0.weight"]),
    (dino, "DINO", True, False, ["student.head.mlp.0.weight", "teacher.head.mlp.2.bias"]),
    (byol_lucidrains, "BYOL", True, False, ["net.conv1.weight", "online_predictor.0.bias"]),
    (byol_yaox12, "BYOL", True, False, ["predictor.predictor.l0.weight", "online_network.projetion.l2.bias"]),
    (byol_sthalles, "BYOL", True, False, ["target_network.projetion.net.0.weight"]),
    (simclr_sthalles, "SimCLR", False, True, []),
    (simclr_spijkervet, "SimCLR", False, False, ["projector.0.weight", "projector.2.weight"]),
    (torchvision_resnet, "timm or torchvision", False, False, ["fc.weight", "fc.bias"]),
]


def same_features(run: Path, network: Network, expected: nn.Module, side: int = 32) -> None:
    encoder, step = load_encoder(run, read_config(run), CheckpointChoice(network))
    assert step == 0
    x_BCHW = torch.randn(4, 3, side, side)
    with torch.no_grad():
        assert torch.equal(encoder.backbone.eval()(x_BCHW), expected.eval()(x_BCHW))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("make", "name", "teacher", "head", "left_out"), OFFICIAL, ids=lambda x: getattr(x, "__name__", "")
)
def test_official_layouts(tmp_path: Path, make: Any, name: str, teacher: bool, head: bool, left_out: list[str]) -> None:
    networks = narrow_resnet(1), narrow_resnet(2)
    file, run = tmp_path / "checkpoint.pth.tar", tmp_path / "imported"
    stored = make(*networks)
    torch.save(stored, file)
    has_name = "arch" in stored or "args" in stored
    summary = import_weights(file, run, None if has_name else "resnet18", NARROW)
    about = read_json(run / "imported.json")
    assert about["layout"] == name
    assert set(left_out) <= set(about["left_out"])
    assert all(key in summary for key in about["left_out"])
    assert ("not looked at: epoch, arch, optimizer, best_acc, Memory_Bank" in summary) == (make is adco)
    same_features(run, "student", networks[0])
    if teacher:
        same_features(run, "teacher", networks[1])
    else:
        with pytest.raises(ValueError, match="has no teacher, only student"):
            load_encoder(run, read_config(run), CheckpointChoice("teacher"))
    assert ("with its head" in summary) == head
    if head:
        config = read_config(run)
        assert (config.model.dim, config.model.hidden) == (12, None)
        encoder, _ = load_encoder(run, config)
        (weight,) = [
            x
            for key, x in stored["state_dict"].items()
            if key.endswith(("encoder_q.fc.2.weight", "backbone.fc.2.weight"))
        ]
        assert torch.equal(encoder.head.get_parameter("2.weight"), weight)


@pytest.mark.usefixtures("group")
def test_vision_transformers_of_torchvision_and_moco_v3(tmp_path: Path) -> None:
    theirs = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128
    )
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    summary = import_weights(tmp_path / "tv.pth", tmp_path / "tv", "vit_tiny_patch16_224", TINY_VIT)
    assert "left out: heads.head.weight, heads.head.bias" in summary
    theirs.heads = nn.Identity()
    x_BCHW = torch.randn(4, 3, 16, 16)
    encoder, _ = load_encoder(tmp_path / "tv", read_config(tmp_path / "tv"))
    with torch.no_grad():
        torch.testing.assert_close(encoder.backbone.eval()(x_BCHW), theirs.eval()(x_BCHW), rtol=1e-5, atol=1e-5)

    arguments = {"depth": 1, "embed_dim": 24, "patch_size": 8, "img_size": 16}
    ours = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12, **arguments)
    state = {**renamed(ours, "module.base_encoder."), **mlp("module.base_encoder.head.", 24, 20, 12)}
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "v3.pth.tar")
    import_weights(tmp_path / "v3.pth.tar", tmp_path / "v3", None, [f"model.backbone_args={arguments}"])
    assert read_config(tmp_path / "v3").model.backbone_args["num_heads"] == 12
    same_features(tmp_path / "v3", "student", ours, 16)


@pytest.mark.usefixtures("group")
def test_safetensors_and_files_without_the_name_of_the_network(tmp_path: Path) -> None:
    network = narrow_resnet(1)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not contain the name of its network: give --backbone"):
        import_weights(tmp_path / "a.safetensors", tmp_path / "run", None, [])
    import_weights(tmp_path / "a.safetensors", tmp_path / "run", "resnet18", NARROW)
    same_features(tmp_path / "run", "student", network)
    with pytest.raises(ValueError, match="exists: choose another name"):
        import_weights(tmp_path / "a.safetensors", tmp_path / "run", "resnet18", NARROW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "run"]


def test_every_key_that_does_not_match_is_named(tmp_path: Path) -> None:
    state = moco_v1(narrow_resnet(1), narrow_resnet(2))["state_dict"]
    state["module.encoder_q.layer9.conv.weight"] = torch.ones(1)
    state["module.strange"] = torch.ones(1)
    state["module.encoder_q.bn1.weight"] = torch.ones(9)
    del state["module.encoder_q.layer2.0.conv1.weight"], state["module.encoder_q.layer4.1.bn2.bias"]
    state["module.encoder_k.conv1.weight"].fill_(float("nan"))
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is not of resnet18 as configured") as caught:
        import_weights(tmp_path / "a.pth", tmp_path / "run", "resnet18", NARROW)
    assert str(caught.value).split("as configured: ")[1] == (
        "file: unknown: strange; student: missing: layer2.0.conv1.weight, layer4.1.bn2.bias; "
        "unknown: layer9.conv.weight; other shapes: bn1.weight is [9], need [64]; teacher: not finite: conv1.weight"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"], "nothing is left behind"


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def damaged(tmp_path: Path, how: str) -> Path:
    path = tmp_path / "a.pth"
    good = {"state_dict": narrow_resnet(1).state_dict()}
    if how == "malicious":
        torch.save({**good, "epoch": Malicious(tmp_path / "trace")}, path)
    elif how == "malicious, old format":
        torch.save({**good, "epoch": Malicious(tmp_path / "trace")}, path, _use_new_zipfile_serialization=False)
    elif how == "malicious number":
        content = b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R."  # numpy.dtype("O", False, True)
        path.write_bytes(
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + content
        )
    elif how == "network":
        torch.save(narrow_resnet(1), path)
    elif how in ("cut", "cut, old format"):
        torch.save(good, path, _use_new_zipfile_serialization=how == "cut")
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "cut safetensors":
        path = path.with_suffix(".safetensors")
        save_file(good["state_dict"], path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "text":
        path.write_text("# A checkpoint")
    elif how == "empty":
        path.touch()
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "nothing inside":
        torch.save({"epoch": 3}, path)
    elif how == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("malicious", "asks for posix.mkdir, which is not data and might run code: refused"),
        ("malicious, old format", "asks for posix.mkdir, which is not data and might run code: refused"),
        ("malicious number", "asks for numpy.dtype('O'), which is not data"),
        ("network", "which is not data and might run code: refused"),
        ("cut", "is not a checkpoint of torch.save, or cut short"),
        ("cut, old format", "is not a checkpoint of torch.save, or cut short"),
        ("cut safetensors", "is not a safetensors file, or cut short"),
        ("text", "is not a checkpoint of torch.save, or damaged"),
        ("empty", "is not a checkpoint of torch.save, or cut short"),
        ("list", "holds a list, need tensors by name"),
        ("nothing inside", "has entries that are not tensors, and no state_dict or"),
        ("folder", "is not a timm model of Hugging Face"),
        ("missing", "No such file or directory"),
    ],
)
def test_other_files_are_refused_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, message: str
) -> None:
    path = damaged(tmp_path, how)
    arguments = ["trainer", "import", str(path), "--backbone", "resnet18", "--out", str(tmp_path / "run")]
    monkeypatch.delenv("TRAINER_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    output = capsys.readouterr().err
    assert message in output
    assert str(path) in output
    assert output.count("\n") == 1
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "run").exists()


def test_an_imported_model_is_evaluated_but_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", each=8)
    file, run = tmp_path / "checkpoint.pth.tar", tmp_path / "imported"
    torch.save(adco(narrow_resnet(1), narrow_resnet(2)), file)
    import_weights(file, run, None, NARROW)
    with pytest.raises(ValueError, match="not-given does not exist"):
        run_evaluation("knn", run, [], None, NEWEST)
    given = [f"data.train={images}", f"data.val={images}", "data.workers=0", "eval.size=16", "eval.k=3"]
    networks: tuple[Network, ...] = ("student", "teacher")
    for network in networks:
        capsys.readouterr()
        run_evaluation("knn", run, given, None, CheckpointChoice(network))
        assert '"knn": ' in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds an imported model"):
        pretrain(read_config(run, given))


def test_training_starts_from_imported_weights(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", each=8)
    file, start = tmp_path / "checkpoint.pth.tar", tmp_path / "imported"
    networks = narrow_resnet(1), narrow_resnet(2)
    torch.save(adco(*networks), file)
    import_weights(file, start, None, NARROW)
    model = {**RESNET, "dim": 12, "weights": str(start)}
    rates: dict[str, dict[str, Any]] = {
        "optim": {"lr": 1e-9},
        "eval": {"knn_every": 0},
        "method": {"teacher_momentum": 1.0, "bn": "local"},
    }
    config = small_config(tmp_path / "run", images, run={"epochs": 1, "save_every": 1}, model=model, **rates)
    pretrain(config)
    with process_group("cpu"):
        kinds: tuple[Network, ...] = ("student", "teacher")
        for kind in kinds:
            encoder, step = load_encoder(tmp_path / "run", config, CheckpointChoice(kind))
            assert step == 2
            for name, x in networks[0].named_parameters():
                torch.testing.assert_close(encoder.backbone.get_parameter(name), x, rtol=0, atol=1e-5)
        assert encoder.head.get_parameter("2.weight").shape == (12, 16)
    shutil.rmtree(start)
    (tmp_path / "run" / "results.json").unlink()
    pretrain(config)  # resumes from its checkpoint, without the imported weights
    wrong = small_config(tmp_path / "run2", images, model={**RESNET, "weights": str(tmp_path / "run")})
    with pytest.raises(
        ValueError, match=r"does not fit the configuration: other shapes: head\.2\.weight is \[12, 16\]"
    ):
        pretrain(wrong)
    other = {**RESNET, "dim": 12, "predictor": 8, "weights": str(tmp_path / "run")}  # a predictor that the file lacks
    pretrain(small_config(tmp_path / "run4", images, run={"epochs": 1, "save_every": 2}, model=other, **rates))
    with process_group("cpu"):
        encoder, _ = load_encoder(tmp_path / "run4", config)
        torch.testing.assert_close(
            encoder.backbone.get_parameter("bn1.weight"), networks[0].get_parameter("bn1.weight")
        )
    with pytest.raises(ValueError, match="nowhere has no usable checkpoint"):
        pretrain(small_config(tmp_path / "run3", images, model={**RESNET, "weights": "nowhere"}))


TINY_MOCO = ["embed_dim=24", "depth=2", "patch_size=8"]


@pytest.fixture
def moco_v3_run(tmp_path: Path) -> tuple[Path, ViT]:
    vit = fixed_positions(ViT(12), rows_first=True)
    torch.save(moco_v3_linear(vit), tmp_path / "a.pth")
    import_weights(tmp_path / "a.pth", tmp_path / "moco", None, ["run.device=cpu"], TINY_MOCO)
    return tmp_path / "moco", vit


def test_exports_have_the_heads_of_the_import(tmp_path: Path, moco_v3_run: tuple[Path, ViT]) -> None:
    run, vit = moco_v3_run
    x_BCHW = torch.randn(3, 3, 16, 16)
    export(run, "huggingface", tmp_path / "folder", NEWEST, "unknown")
    usage = export(run, "timm", tmp_path / "a.safetensors", NEWEST, "unknown")
    assert "num_heads=12" in usage
    assert (
        "with embed_dim=24, depth=2, patch_size=8, num_heads=12, img_size=16"
        in (tmp_path / "folder" / "README.md").read_text()
    )
    usage_torchvision = export(run, "torchvision", tmp_path / "b.safetensors", NEWEST, "unknown")
    assert "torchvision.models.VisionTransformer(16, 8, 2, 12, 24, 96)" in usage_torchvision
    networks: list[nn.Module] = [
        timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True),
        eval(re.findall(r"timm\.create_model\(.*\)", usage)[0], {"timm": timm}),
    ]
    with torch.no_grad():
        for network in networks:
            torch.testing.assert_close(network.eval()(x_BCHW), vit(x_BCHW), rtol=1e-4, atol=1e-5)


def test_training_from_an_import_needs_its_architecture(tmp_path: Path, moco_v3_run: tuple[Path, ViT]) -> None:
    run, _ = moco_v3_run
    photos = write_images(tmp_path / "images", each=8)
    arguments = read_config(run).model.backbone_args
    model = {"backbone": "vit_small_patch16_224", "dim": 16, "weights": str(run)}
    sections: dict[str, Any] = {"run": {"epochs": 1, "save_every": 2}, "eval": {"knn_every": 0}}

    def config(**others: Any) -> Config:
        changed = {**model, "backbone_args": {**arguments, **others}}
        return small_config(tmp_path / "run", photos, **sections, model=changed)

    with pytest.raises(ValueError, match=r"blocks\.0\.attn is Attention\(num_heads=12\), the configuration has .*=6\)"):
        pretrain(config(num_heads=6))
    with pytest.raises(ValueError, match=r"moco has another architecture .*ReLU\(\)"):
        pretrain(config(act_layer="relu"))
    pretrain(config(drop_path_rate=0.1))
    assert read_config(tmp_path / "run").model.backbone_args["num_heads"] == 12
