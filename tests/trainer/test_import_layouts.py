"""Files with the tensor names of public code give the features of the network that they are from."""

import argparse
import json
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.trainer.foreign import (
    Make,
    State,
    SwavResNet,
    ViT,
    children,
    fixed_positions,
    generator,
    mlp,
    moco_v3_linear,
    narrow_resnet,
    renamed,
    small_stem,
    transformers_names,
)
from trainer.interop.architecture import backbone_name, normalisation
from trainer.interop.import_ import import_weights
from trainer.interop.layouts import Layout
from trainer.interop.weights import CheckpointChoice, Network, load_encoder
from trainer.run.directory import read_config
from trainer.run.files import read_json

NARROW = ["channels=[8, 8, 8, 16]"]
TINY = ["embed_dim=24", "depth=2", "patch_size=8"]  # of tests.trainer.foreign.ViT
LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.1.0", "optimizer_states": [], "callbacks": {}}

pytestmark = pytest.mark.usefixtures("group")


def features(run: Path, network: Network = "student", side: int = 16) -> Tensor:
    encoder, _ = load_encoder(run, read_config(run), CheckpointChoice(network))
    with torch.no_grad():
        out: Tensor = encoder.backbone.eval()(images(side))
    return out


def images(side: int) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(side))


def same(run: Path, expected: nn.Module, network: Network = "student", side: int = 16) -> None:
    with torch.no_grad():
        torch.testing.assert_close(features(run, network, side), expected.eval()(images(side)), rtol=1e-4, atol=1e-5)


# The makers have the names in the sources at the top of trainer/interop/layouts.py.


def swav(student: nn.Module, teacher: nn.Module) -> Any:
    return {
        **renamed(student, "module."),
        **mlp("module.projection_head.", 16, 20, 12),
        "module.projection_head.1.running_mean": torch.zeros(20),
        "module.prototypes.weight": torch.randn(30, 12),
    }


def swav_checkpoint(student: nn.Module, teacher: nn.Module) -> Any:
    state = {**swav(student, teacher), "module.prototypes.prototypes0.weight": torch.randn(30, 12)}
    return {"epoch": 9, "state_dict": state, "optimizer": {}}


def lightly_moco(student: nn.Module, teacher: nn.Module) -> Any:
    """As examples/pytorch_lightning/moco.py."""
    state = {
        **children(student, "backbone."),
        **mlp("projection_head.layers.", 16, 16, 12),
        **children(teacher, "backbone_momentum."),
        **mlp("projection_head_momentum.layers.", 16, 16, 12),
        "criterion.memory_bank.bank": torch.randn(12, 30),
        "criterion.memory_bank.bank_ptr": torch.zeros(1, dtype=torch.long),
    }
    return {**LIGHTNING, "state_dict": state}


def lightly_moco_benchmark(student: nn.Module, teacher: nn.Module) -> Any:
    """As benchmarks/imagenet/resnet50/mocov2.py, where `backbone` is the momentum encoder."""
    state = {
        **renamed(teacher, "backbone."),
        **mlp("projection_head.layers.", 16, 16, 12),
        **renamed(student, "query_backbone."),
        **mlp("query_projection_head.layers.", 16, 16, 12),
        "online_classifier.linear.weight": torch.randn(10, 16),
    }
    return {**LIGHTNING, "hyper_parameters": {"batch_size_per_device": 64}, "state_dict": state}


def lightly_byol(student: nn.Module, teacher: nn.Module) -> Any:
    state = {**renamed(student, "backbone."), **renamed(teacher, "teacher_backbone.")}
    heads = {**mlp("prediction_head.layers.", 12, 16, 12), **mlp("teacher_projection_head.layers.", 16, 16, 12)}
    return {**LIGHTNING, "state_dict": {**state, **heads}}


def lightly_dino(student: nn.Module, teacher: nn.Module) -> Any:
    """As examples/pytorch_lightning/dino.py."""
    state = {**children(student, "student_backbone."), **children(teacher, "teacher_backbone.")}
    heads = {**mlp("student_head.layers.", 16, 12), **mlp("teacher_head.layers.", 16, 12)}
    return {**LIGHTNING, "state_dict": {**state, **heads, "criterion.center": torch.zeros(1, 1, 12)}}


def solo_learn(student: nn.Module, teacher: nn.Module) -> Any:
    state = {
        **renamed(student, "backbone."),
        "classifier.weight": torch.randn(10, 16),
        "classifier.bias": torch.randn(10),
        **mlp("projector.", 16, 16, 12),
        **mlp("predictor.", 12, 16, 12),
        **renamed(teacher, "momentum_backbone."),
        "momentum_classifier.weight": torch.randn(10, 16),
        **mlp("momentum_projector.", 16, 16, 12),
        "queue": torch.randn(2, 12, 30),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    return {**LIGHTNING, "state_dict": state}


def solo_learn_old(student: nn.Module, teacher: nn.Module) -> Any:
    """Before version 1.0.4 the backbone was the encoder."""
    state = {**renamed(student, "encoder."), **renamed(teacher, "momentum_encoder.")}
    return {**LIGHTNING, "state_dict": {**state, "classifier.weight": torch.randn(10, 16)}}


def solo_learn_swav(student: nn.Module, teacher: nn.Module) -> Any:
    state = {**renamed(student, "backbone."), "classifier.weight": torch.randn(10, 16)}
    heads = {
        **mlp("projector.", 16, 12),
        "prototypes.weight_g": torch.ones(30, 1),
        "prototypes.weight_v": torch.ones(30, 12),
    }
    return {**LIGHTNING, "state_dict": {**state, **heads}}


def simsiam(student: nn.Module, teacher: nn.Module) -> Any:
    """As simsiam/builder.py: three layers with BatchNorm in fc."""
    state = {**renamed(student, "module.encoder."), **mlp("module.encoder.fc.", 16, 16)}
    state |= {"module.encoder.fc.3.weight": torch.randn(16, 16), "module.encoder.fc.6.weight": torch.randn(12, 16)}
    return {"arch": "resnet18", "state_dict": {**state, **mlp("module.predictor.", 12, 4, 12)}}


def barlow_twins(student: nn.Module, teacher: nn.Module) -> Any:
    state = {**renamed(student, "module.backbone."), **mlp("module.projector.", 16, 16, 12)}
    return {"epoch": 3, "model": {**state, "module.bn.running_mean": torch.zeros(12)}, "optimizer": {}}


def vissl(student: nn.Module, teacher: nn.Module) -> Any:
    trunk = renamed(student, "base_model._feature_blocks.")
    model = {
        "trunk": {name.removeprefix("base_model."): x for name, x in trunk.items()},
        "heads": mlp("0.clf.0.", 16, 12),
    }
    return {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": model, "meta": {"config": {}}}}}


def teacher_only(student: nn.Module, teacher: nn.Module) -> Any:
    """As DINOv2 writes eval/*/teacher_checkpoint.pth."""
    state = {**renamed(student, "backbone."), **mlp("dino_head.mlp.", 16, 12), **mlp("ibot_head.mlp.", 16, 12)}
    return {"teacher": state}


def with_ema(student: nn.Module, teacher: nn.Module) -> Any:
    """As timm's CheckpointSaver."""
    return {"epoch": 3, "arch": "resnet18", "state_dict": renamed(student, ""), "state_dict_ema": renamed(teacher, "")}


def compiled_inside(student: nn.Module, teacher: nn.Module) -> Any:
    """A LightningModule with a compiled backbone inside DistributedDataParallel inside a Fabric module."""
    heads = mlp("_forward_module.model.projector.module.", 16, 12)
    return {"state_dict": {**renamed(student, "_forward_module.model.backbone._orig_mod.module."), **heads}}


def lucidrains_in_lightning(student: nn.Module, teacher: nn.Module) -> Any:
    state = {**renamed(student, "online_encoder.net."), **renamed(teacher, "target_encoder.net.")}
    return {**LIGHTNING, "state_dict": {f"learner.{name}": x for name, x in state.items()}}


def thop_and_swa(student: nn.Module, teacher: nn.Module) -> Any:
    """Counters of thop.profile and of torch's AveragedModel."""
    state = {**renamed(student, "module."), "n_averaged": torch.tensor(3)}
    return {**state, "module.total_ops": torch.zeros(1), "module.layer1.0.conv1.total_params": torch.zeros(1)}


RESNETS: list[tuple[Make, str, bool]] = [  # the layout's name, and whether there is a teacher
    (swav, "SwAV", False),
    (swav_checkpoint, "SwAV", False),
    (lightly_moco, "lightly", True),
    (lightly_moco_benchmark, "lightly", True),
    (lightly_byol, "lightly", True),
    (lightly_dino, "lightly", True),
    (solo_learn, "solo-learn", True),
    (solo_learn_old, "solo-learn", True),
    (solo_learn_swav, "solo-learn", False),
    (simsiam, "SimSiam", False),
    (barlow_twins, "a backbone in a larger model", False),
    (vissl, "VISSL", False),
    (teacher_only, "DINOv2", False),
    (with_ema, "timm or torchvision", True),
    (compiled_inside, "a backbone in a larger model", False),
    (lucidrains_in_lightning, "BYOL", True),
    (thop_and_swa, "timm or torchvision", False),
]


@pytest.mark.parametrize(("make", "layout", "teacher"), RESNETS, ids=lambda x: getattr(x, "__name__", ""))
def test_resnets(tmp_path: Path, make: Make, layout: str, teacher: bool) -> None:
    networks = narrow_resnet(1), narrow_resnet(2)
    file, run = tmp_path / "a.ckpt", tmp_path / "run"
    stored = make(*networks)
    torch.save(stored, file)
    summary = import_weights(file, run, None if "arch" in stored else "resnet18", ["run.device=cpu"], NARROW)
    about = read_json(run / "imported.json")
    assert about["layout"] == layout
    assert f"of {layout}:" in summary
    assert ("normalisation: not in the file" in summary) == (
        layout in ("a backbone in a larger model", "solo-learn", "timm or torchvision", "BYOL")
    )
    assert read_config(run).model.backbone_args["channels"] == [8, 8, 8, 16]
    same(run, SwavResNet(networks[0]) if layout == "SwAV" else networks[0], side=32)
    assert about["networks"] == (["student", "teacher"] if teacher else ["student"])
    if teacher:
        same(run, networks[1], "teacher", side=32)
    if make is teacher_only:
        assert "the teacher, as the student" in summary


def dino_linear(vit: ViT) -> Any:
    return renamed(vit, "")


def moco_v3(vit: ViT) -> Any:
    state = {**renamed(vit, "module.base_encoder."), **renamed(vit, "module.momentum_encoder.")}
    return {"arch": "vit_small", "state_dict": {**state, **mlp("module.predictor.", 12, 12)}}


def mae_state(vit: ViT, width: int = 16) -> State:
    decoder = ViT(2, width=width)
    return {
        **renamed(vit, ""),
        "mask_token": torch.randn(1, 1, width),
        "decoder_pos_embed": fixed_positions(decoder, rows_first=False).pos_embed,
        **mlp("decoder_embed.", 24, width),
        **renamed(decoder.blocks, "decoder_blocks."),
        **renamed(decoder.norm, "decoder_norm."),
        **renamed(nn.Linear(width, 192), "decoder_pred."),
    }


def mae(vit: ViT) -> Any:
    """As main_pretrain.py saves it."""
    arguments = argparse.Namespace(model="mae_vit_base_patch16", input_size=16, output_dir=Path("/out"))
    return {"model": mae_state(vit), "epoch": 800, "args": arguments, "scaler": {}}


def ibot(vit: ViT) -> Any:
    state = {**renamed(vit, "module.backbone."), "module.backbone.masked_embed": torch.zeros(1, 24)}
    arguments = argparse.Namespace(arch="vit_small", patch_size=8)
    teacher = {**renamed(vit, "backbone."), **mlp("head.mlp.", 24, 12), **mlp("head.last_layer2.", 24, 12)}
    return {"student": {**state, **mlp("module.head.mlp.", 24, 12)}, "teacher": teacher, "args": arguments}


def deit3(vit: ViT) -> Any:
    return {
        "model": {
            name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): x
            for name, x in renamed(vit, "").items()
        }
    }


def masked_vit_of_lightly(vit: ViT) -> Any:
    """As benchmarks/imagenet/vitb16/dinov2.py."""
    teacher = {**renamed(vit, "teacher_backbone.vit."), "teacher_backbone.mask_token": torch.zeros(1, 1, 24)}
    heads = mlp("student_dino_head._dino_head.layers.", 24, 12)
    return {**LIGHTNING, "state_dict": {**teacher, **renamed(vit, "student_backbone.vit."), **heads}}


def mmpretrain(vit: ViT) -> Any:
    names = (
        ("blocks.", "layers."),
        (".norm1.", ".ln1."),
        (".norm2.", ".ln2."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        ("embed.proj.", "embed.projection."),
    )
    state = {}
    for name, x in vit.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        state[f"backbone.{'ln1' + name[4:] if name.startswith('norm.') else name}"] = x
    return {"meta": {"epoch": 300}, "state_dict": {**state, **mlp("neck.", 24, 12), **mlp("head.predictor.", 12, 12)}}


def fine_tuned_mae(vit: ViT) -> Any:
    """As main_finetune.py saves it with global pooling: the norm is after the mean of the patches."""
    state = {
        name.replace("norm.", "fc_norm.") if name[:5] == "norm." else name: x for name, x in renamed(vit, "").items()
    }
    return {"model": {**state, **mlp("head.", 24, 10)}, "args": argparse.Namespace(model="vit_base_patch16")}


VITS: list[tuple[Callable[[ViT], Any], ViT, str | None, list[str]]] = [  # the name and arguments that must be given
    (dino_linear, ViT(6), "vit_small_patch16_224", TINY),
    (moco_v3_linear, fixed_positions(ViT(12), rows_first=True), None, TINY),
    (moco_v3_linear, fixed_positions(ViT(12), rows_first=True), "vit_small_patch16_224", TINY),
    (moco_v3_linear, fixed_positions(ViT(6), rows_first=True), None, [*TINY, "num_heads=6"]),
    (moco_v3, ViT(12), None, TINY),
    (mae, fixed_positions(ViT(12), rows_first=False), None, TINY),
    (ibot, ViT(6), None, TINY),
    (deit3, ViT(6, scale=True), "vit_small_patch16_224", TINY),
    (mmpretrain, ViT(6), "vit_small_patch16_224", TINY),
    (masked_vit_of_lightly, ViT(6, scale=True), "vit_small_patch16_224", TINY),
]


@pytest.mark.parametrize(("make", "vit", "name", "arguments"), VITS, ids=lambda x: getattr(x, "__name__", ""))
def test_vits(tmp_path: Path, make: Any, vit: ViT, name: str | None, arguments: list[str]) -> None:
    torch.save(make(vit), tmp_path / "a.pth")
    summary = import_weights(tmp_path / "a.pth", tmp_path / "run", name, ["run.device=cpu"], arguments)
    assert ("num_heads=6 (timm's vit_small_patch16_224" in summary) == (name is not None and vit.heads == 6)
    same(tmp_path / "run", vit)
    config = read_config(tmp_path / "run")
    assert config.model.backbone_args["img_size"] == 16, "the number of positions shows it"
    assert config.eval.size == 16


def test_a_fine_tuned_mae_has_the_mean_of_the_patches(tmp_path: Path) -> None:
    vit = ViT(12)
    torch.save(fine_tuned_mae(vit), tmp_path / "a.pth")
    import_weights(tmp_path / "a.pth", tmp_path / "run", None, ["run.device=cpu"], TINY)
    tokens: list[Tensor] = []
    vit.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        vit(images(16))
        torch.testing.assert_close(features(tmp_path / "run"), vit.norm(tokens[0][:, 1:].mean(1)), rtol=1e-4, atol=1e-5)


def chunked(state: State, chunk: int) -> State:
    """Names the blocks as DINOv2's BlockChunk does, with the index of a block in all of them."""
    return {
        ".".join(["blocks", str(int(name.split(".")[1]) // chunk), *name.split(".")[1:]])
        if name[:7] == "blocks."
        else name: x
        for name, x in state.items()
    }


@pytest.mark.parametrize(
    ("registers", "swiglu", "prefix"), [(0, False, ""), (4, False, "backbone."), (4, True, "student.backbone.")]
)
def test_dinov2(tmp_path: Path, registers: int, swiglu: bool, prefix: str) -> None:
    vit = ViT(6, scale=True, registers=registers, swiglu=swiglu)
    state = {**renamed(vit, ""), "mask_token": torch.zeros(1, 24)}
    if prefix:
        state = {prefix + name: x for name, x in chunked(state, 1).items()} | mlp(
            f"{prefix[:-9]}dino_head.mlp.", 24, 12
        )
    stored = {"": state, "backbone.": {"teacher": state}, "student.backbone.": {"model": state, "iteration": 99}}[
        prefix
    ]
    torch.save(stored, tmp_path / "a.pth")
    name = f"vit_{'giant' if swiglu else 'small'}_patch14{'_reg4' if registers else ''}_dinov2"
    arguments = [*TINY, "num_heads=6", *(["mlp_ratio=4"] if swiglu else [])]
    summary = import_weights(tmp_path / "a.pth", tmp_path / "run", name, ["run.device=cpu"], arguments)
    assert "of DINOv2: " in summary
    assert "mask_token" in summary
    same(tmp_path / "run", vit)


def test_dinov2_is_recognised_by_its_shapes() -> None:
    layout = Layout("DINOv2", "")
    for width, size in ((384, "small"), (768, "base"), (1536, "giant")):
        with torch.device("meta"):
            tensors = {"cls_token": torch.empty(1, 1, width), "patch_embed.proj.weight": torch.empty(width, 3, 14, 14)}
            registers = {**tensors, "reg_token": torch.empty(1, 4, width)}
        assert backbone_name({}, layout, tensors) == (f"vit_{size}_patch14_dinov2", False)
        assert backbone_name({}, layout, registers) == (f"vit_{size}_patch14_reg4_dinov2", False)


@pytest.mark.parametrize("new", [False, True], ids=["files", "memory"])
@pytest.mark.parametrize("mean", [0.485, 0.5])
def test_folders_of_transformers(tmp_path: Path, new: bool, mean: float) -> None:
    vit, folder = ViT(3), tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "vit",
        "num_attention_heads": 3,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "patch_size": 8,
    }
    statistics = {0.485: {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}}
    default = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics.get(mean, default)))
    state = transformers_names(vit, new)
    state |= {"pooler.dense.weight": torch.zeros(24, 24), "pooler.dense.bias": torch.zeros(24)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    summary = import_weights(folder, tmp_path / "run", None, ["run.device=cpu"])
    assert "num_heads=3 (the file's settings)" in summary
    assert "layer norms add 1e-06, the file's network added 1e-12" in summary
    assert ("patch_embed.proj was changed" in summary) == (mean == 0.5)
    pixels = (
        images(16) * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    with torch.no_grad():
        expected = vit(images(16) if mean == 0.485 else (pixels - 0.5) / 0.5)
    torch.testing.assert_close(features(tmp_path / "run"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "layout", "name", "mean"),
    [
        ({}, "MoCo v3", "resnet18", 0.485),
        ({}, "timm or torchvision", "vit_base_patch16_224", None),
        ({}, "timm or torchvision", "vit_base_patch16_224.augreg_in21k", 0.5),
        ({"pretrained_cfg.mean": (0.48, 0.45, 0.4), "pretrained_cfg.std": (1, 1, 1)}, "DINO", "resnet18", 0.48),
        ({"do_normalize": False}, "timm or torchvision", "vit_base_patch16_224", 0),
    ],
)
def test_the_source_of_the_normalisation(settings: dict[str, Any], layout: str, name: str, mean: float | None) -> None:
    known = normalisation(settings, Layout(layout, ""), name)
    assert (known[0][0] if known else None) == mean


def test_weights_in_several_files(tmp_path: Path) -> None:
    network, folder = narrow_resnet(1), tmp_path / "model"
    folder.mkdir()
    state = renamed(network, "")
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "model_args": {"channels": [8, 8, 8, 16]}})
    )
    import_weights(folder, tmp_path / "a", None, ["run.device=cpu"])
    same(tmp_path / "a", network, side=32)
    import_weights(folder / "model.safetensors.index.json", tmp_path / "b", "resnet18", ["run.device=cpu"], NARROW)
    same(tmp_path / "b", network, side=32)
    hashes = [read_json(tmp_path / run / "imported.json")["sha256"] for run in ("a", "b")]
    assert hashes[0] == hashes[1]
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the files model-00002-of-00002\.safetensors do not exist beside it"):
        import_weights(folder, tmp_path / "c", None, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last(tmp_path: Path, dtype: torch.dtype) -> None:
    network = narrow_resnet(1).to(dtype).to(memory_format=torch.channels_last)
    torch.save({"arch": "resnet18", "state_dict": network.state_dict()}, tmp_path / "a.pth")
    import_weights(tmp_path / "a.pth", tmp_path / "run", None, ["run.device=cpu"], NARROW)
    same(tmp_path / "run", network.float(), side=32)


def test_tensors_of_a_gpu_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save(renamed(narrow_resnet(1), ""), tmp_path / "a.pth")
    assert b"cuda:3" in (tmp_path / "a.pth").read_bytes()
    import_weights(tmp_path / "a.pth", tmp_path / "run", "resnet18", ["run.device=cpu"], NARROW)
    same(tmp_path / "run", narrow_resnet(1), side=32)


def test_names_in_the_metadata_of_safetensors(tmp_path: Path) -> None:
    network = narrow_resnet(1)
    save_file(renamed(network, ""), tmp_path / "a.safetensors", {"format": "pt", "architecture": "resnet18"})
    import_weights(tmp_path / "a.safetensors", tmp_path / "run", None, ["run.device=cpu"], NARROW)
    same(tmp_path / "run", network, side=32)


@pytest.mark.parametrize("module", ["pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data"])
def test_hyper_parameters_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Lightning stores them in its own subclass of dict, and often paths in them."""
    names = module.split(".")
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), types.ModuleType(".".join(names[:end])))
    its_own = type("AttributeDict", (OrderedDict,), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], "AttributeDict", its_own, raising=False)
    parameters = its_own(backbone="resnet18", root=Path("/data"), lr=0.1)
    torch.save(
        {**lightly_byol(narrow_resnet(1), narrow_resnet(2)), "hyper_parameters": parameters}, tmp_path / "a.ckpt"
    )
    import_weights(tmp_path / "a.ckpt", tmp_path / "run", None, ["run.device=cpu"], NARROW)
    same(tmp_path / "run", narrow_resnet(1), side=32)


def test_objects_of_other_programs_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("omegaconf.dictconfig")
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    module.DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})  # type: ignore[attr-defined]
    torch.save({"state_dict": renamed(narrow_resnet(1), ""), "cfg": module.DictConfig()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"asks for omegaconf\.dictconfig\.DictConfig.*refused") as caught:
        import_weights(tmp_path / "a.ckpt", tmp_path / "run", "resnet18", [])
    assert "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split('python -c "')[1].split('"')[0])
    import_weights(tmp_path / "tensors.pth", tmp_path / "run", "resnet18", ["run.device=cpu"], NARROW)
    same(tmp_path / "run", narrow_resnet(1), side=32)


OPEN: list[tuple[Any, str | None, str, list[str], list[str]]] = [
    # the file, the name, the error, and the arguments and overrides that settle it
    ({"arch": "vit_small", "state_dict": ViT(6)}, None, "attention heads is open.*num_heads=N", ["num_heads=6"], []),
    (fixed_positions(ViT(12), rows_first=False), "vit_small_patch16_224", "heads is open", ["num_heads=12"], []),
    (fixed_positions(ViT(3), rows_first=False), "vit_tiny_patch16_224", "3 or 12", ["num_heads=3"], []),
    (
        small_stem(narrow_resnet(1), 2),
        "resnet18",
        r"3 x 3 convolution .* no tensor shows its stride and its padding.*stem_padding=2",
        NARROW,
        ["model.small_images=true", "model.stem_padding=2"],
    ),
    (small_stem(narrow_resnet(1), 1), "resnet18", "3 x 3 convolution", NARROW, ["model.small_images=true"]),
]


@pytest.mark.parametrize(("stored", "name", "message", "arguments", "overrides"), OPEN, ids=range(len(OPEN)))
def test_what_no_tensor_shows_is_asked_for(
    tmp_path: Path, stored: Any, name: str | None, message: str, arguments: list[str], overrides: list[str]
) -> None:
    network = stored["state_dict"] if isinstance(stored, dict) else stored
    state = renamed(network, "module.")
    torch.save({**stored, "state_dict": state} if isinstance(stored, dict) else state, tmp_path / "a.pth")
    known = TINY if isinstance(network, ViT) else NARROW
    with pytest.raises(ValueError, match=message) as caught:
        import_weights(tmp_path / "a.pth", tmp_path / "run", name, [], known)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    import_weights(tmp_path / "a.pth", tmp_path / "run", name, ["run.device=cpu", *overrides], [*known, *arguments])
    same(tmp_path / "run", network, side=16 if isinstance(network, ViT) else 32)


def test_the_stem_of_lightly_is_known(tmp_path: Path) -> None:
    network = small_stem(narrow_resnet(1), 1)
    state = {**generator(network, "backbone."), **mlp("projection_head.layers.", 16, 12)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    summary = import_weights(tmp_path / "a.ckpt", tmp_path / "run", "resnet18", ["run.device=cpu"], NARROW)
    assert "model.small_images=True (lightly's ResNetGenerator)" in summary
    assert read_config(tmp_path / "run").eval.size == 32
    same(tmp_path / "run", network, side=32)


@pytest.mark.parametrize("overrides", [[], ["model.small_images=true"]])
def test_children_of_lightly_s_generator_are_another_network(tmp_path: Path, overrides: list[str]) -> None:
    """Its first ReLU is a function, so it is not in an nn.Sequential of its children."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}
    state = generator(small_stem(narrow_resnet(1), 1), "")
    named = {f"backbone.{numbers[name.split('.')[0]]}.{name.partition('.')[2]}": x for name, x in state.items()}
    torch.save({"state_dict": named}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="has no ReLU after its first BatchNorm"):
        import_weights(tmp_path / "a.ckpt", tmp_path / "run", "resnet18", overrides, NARROW)


def convnext_of_its_authors(network: nn.Module, prefix: str = "backbone.") -> State:
    """Returns the names of facebookresearch/ConvNeXt, which solo-learn has too."""
    names = (
        (r"^stem\.(\d)", r"downsample_layers.0.\1"),
        (r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2"),
        (r"^(stages\.\d)\.blocks\.(\d)\.", r"\1.\2."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
    state: State = {}
    for name, x in network.state_dict().items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        state[prefix + name] = x
    return state


def swin_of_its_authors(network: nn.Module) -> State:
    """Returns the names of microsoft/Swin-Transformer, whose stages end with the downsampling, and its buffers."""
    state: State = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    for name, x in network.state_dict().items():
        name = re.sub(r"^layers\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name)
        state[name.replace("head.fc.", "head.")] = x
    return state


CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64, "window_size": 2}


def as_words(arguments: dict[str, Any]) -> list[str]:
    """Returns the values of --backbone-args."""
    return [f"{key}={json.dumps(value)}" for key, value in arguments.items()]


def test_names_that_timm_converts_itself(tmp_path: Path) -> None:
    network = timm.create_model("convnext_tiny", num_classes=0, **CONVNEXT)
    state = {**convnext_of_its_authors(network), "classifier.weight": torch.zeros(10, 16)}
    torch.save(
        {**LIGHTNING, "hyper_parameters": {"backbone": {"name": "convnext_tiny"}}, "state_dict": state},
        tmp_path / "a.ckpt",
    )
    import_weights(tmp_path / "a.ckpt", tmp_path / "run", None, ["run.device=cpu"], as_words(CONVNEXT))
    same(tmp_path / "run", network, side=64)


@pytest.mark.parametrize(
    ("name", "arguments", "rename"),
    [
        ("convnext_tiny", CONVNEXT, lambda network: convnext_of_its_authors(network, "")),
        ("swin_tiny_patch4_window7_224", SWIN, swin_of_its_authors),
    ],
)
def test_classifiers_of_files_that_timm_converts_itself(
    tmp_path: Path, name: str, arguments: dict[str, Any], rename: Callable[[nn.Module], State]
) -> None:
    """The authors' own files have a classifier, which timm's converter renames to one that the encoder lacks."""
    network = timm.create_model(name, num_classes=10, **arguments)
    state = rename(network)
    assert {"norm.weight", "head.weight", "head.bias"} <= state.keys()
    torch.save({"model": state}, tmp_path / "a.pth")
    summary = import_weights(tmp_path / "a.pth", tmp_path / "run", name, ["run.device=cpu"], as_words(arguments))
    assert "left out: head.fc.weight, head.fc.bias (not of the encoder)" in summary
    network.reset_classifier(0)
    same(tmp_path / "run", network, side=64)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("beit_base_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 64}),
        ("vit_small_patch16_dinov3", {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 64}),
    ],
)
def test_layer_scale_that_timm_calls_gamma(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    """DeiT III's file has the same name for a tensor that timm's ViT calls ls1.gamma."""
    network = timm.create_model(name, num_classes=0, **arguments)
    assert "blocks.0.gamma_1" in network.state_dict()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    import_weights(tmp_path / "model.safetensors", tmp_path / "run", name, ["run.device=cpu"], as_words(arguments))
    same(tmp_path / "run", network, side=64)


def wrong_networks() -> dict[str, tuple[State, str, dict[str, Any]]]:
    """Returns files of another network than the named one: the tensors, the name, and its arguments."""
    deeper = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **SWIN | {"depths": (1, 1, 3, 1)})
    linears = {"features.0.0.weight": torch.zeros(8, 3, 4, 4), "features.1.0.block.3.weight": torch.zeros(32, 8)}
    return {
        "torchvision's ConvNeXt": (linears | {"classifier.2.weight": torch.zeros(9, 16)}, "convnext_tiny", CONVNEXT),
        "a ResNet": (renamed(narrow_resnet(1), "") | {"fc.weight": torch.zeros(9, 16)}, "convnext_tiny", CONVNEXT),
        "a deeper Swin": (swin_of_its_authors(deeper), "swin_tiny_patch4_window7_224", SWIN),
    }


@pytest.mark.parametrize("case", ["torchvision's ConvNeXt", "a ResNet", "a deeper Swin"])
def test_errors_of_timm_s_converter_end_in_the_names_that_differ(tmp_path: Path, case: str) -> None:
    state, name, arguments = wrong_networks()[case]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"is not of {name} as configured: .*missing: .*unknown: "):
        import_weights(tmp_path / "a.pth", tmp_path / "run", name, [], as_words(arguments))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["weights", "my_encoder"])
def test_tensors_in_an_entry_of_any_name(tmp_path: Path, key: str) -> None:
    network = narrow_resnet(1)
    torch.save({key: renamed(network, ""), "note": "good", "optimizer": {"state": {}}}, tmp_path / "a.pt")
    summary = import_weights(tmp_path / "a.pt", tmp_path / "run", "resnet18", ["run.device=cpu"], NARROW)
    assert "not looked at: note, optimizer" in summary
    same(tmp_path / "run", network, side=32)


def test_positions_of_patches_only(tmp_path: Path) -> None:
    """DeiT III adds positions before the class token."""
    vit = ViT(6, scale=True)
    vit.pos_embed.data[:, 0] = 0
    state = {**renamed(vit, ""), "pos_embed": vit.pos_embed[:, 1:].detach()}
    torch.save(state, tmp_path / "a.pth")
    import_weights(tmp_path / "a.pth", tmp_path / "run", "vit_small_patch16_224", ["run.device=cpu"], TINY)
    assert read_config(tmp_path / "run").model.backbone_args["no_embed_class"] is True
    same(tmp_path / "run", vit)


@pytest.mark.parametrize(
    "entries",
    [
        {"meta": {"config": "model = dict(\n backbone=dict(type='ResNet', depth=50, style='caffe'))"}},
        {"hyper_parameters": {"backbone": {"depth": 50, "style": "caffe"}}},
    ],
)
def test_caffe_s_strides_are_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    torch.save({**entries, "state_dict": renamed(narrow_resnet(1), "backbone.")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="stride in the 1 x 1 convolution"):
        import_weights(tmp_path / "a.pth", tmp_path / "run", "resnet18", [], NARROW)


def test_a_vit_without_a_class_token(tmp_path: Path) -> None:
    """I-JEPA's file has the encoder and the target encoder as entries of their own."""
    state = {name: x for name, x in renamed(ViT(12), "module.").items() if "cls_token" not in name}
    state["module.pos_embed"] = state["module.pos_embed"][:, 1:]
    torch.save({"encoder": state, "target_encoder": state, "predictor": {}}, tmp_path / "a.tar")
    with pytest.raises(
        ValueError, match="no class token, so the pooling is open: give --backbone-args class_token=false"
    ):
        import_weights(tmp_path / "a.tar", tmp_path / "run", "vit_base_patch16_224", [], TINY)
    settled = [*TINY, "{class_token: false, global_pool: avg, fc_norm: false}"]
    import_weights(tmp_path / "a.tar", tmp_path / "run", "vit_base_patch16_224", ["run.device=cpu"], settled)
    assert read_json(tmp_path / "run" / "imported.json")["networks"] == ["student", "teacher"]
    assert read_config(tmp_path / "run").model.backbone_args["img_size"] == 16


def test_patterns_of_tensors_to_leave_out(tmp_path: Path) -> None:
    network = narrow_resnet(1)
    extra = {"clusters.0.weight": torch.ones(2), "clusters.1.weight": torch.ones(2), "step": torch.ones(1)}
    torch.save({**renamed(network, ""), **extra, "fc.weight": torch.ones(9, 16)}, tmp_path / "a.pth")
    file, run = tmp_path / "a.pth", tmp_path / "run"
    with pytest.raises(ValueError, match=r"unknown: clusters\.0\.weight, clusters\.1\.weight, step"):
        import_weights(file, run, "resnet18", [], NARROW)
    with pytest.raises(ValueError, match=r"--ignore: no tensor matches cluster\.\*; the names begin with"):
        import_weights(file, run, "resnet18", [], NARROW, ["cluster.*"])
    with pytest.raises(ValueError, match=r"missing: conv1\.weight"):
        import_weights(file, run, "resnet18", [], NARROW, ["cl*", "step", "conv1.*"])
    summary = import_weights(file, run, "resnet18", ["run.device=cpu"], NARROW, ["clusters.*", "step"])
    assert "left out: fc.weight (not of the encoder)" in summary
    assert "left out: clusters.0.weight, clusters.1.weight, step (--ignore)" in summary
    assert read_json(run / "imported.json")["left_out"] == ["fc.weight", *extra]
    same(run, network, side=32)


def test_the_same_tensor_twice_is_refused(tmp_path: Path) -> None:
    state = renamed(narrow_resnet(1), "")
    torch.save({**state, "module.bn1.weight": torch.ones(64)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"has both bn1\.weight and module\.bn1\.weight"):
        import_weights(tmp_path / "a.pth", tmp_path / "run", "resnet18", [], NARROW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_heads=7"], r"model\.backbone_args: vit_small_patch16_224 does not take .*divisible by num_heads"),
        (["img_size=96"], "img_size=96 was given, but the file has position embeddings for 16 pixels"),
        (["colour=3"], "does not take .*colour"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: list[str], message: str) -> None:
    torch.save(renamed(ViT(6), ""), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        import_weights(tmp_path / "a.pth", tmp_path / "run", "vit_small_patch16_224", [], [*TINY, *arguments])
    assert not (tmp_path / "run").exists()


def test_entries_that_are_not_tensors_are_reported(tmp_path: Path) -> None:
    state = {**renamed(narrow_resnet(1), ""), "steps": 3, "bn1._extra_state": None}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    summary = import_weights(tmp_path / "a.pth", tmp_path / "run", "resnet18", ["run.device=cpu"], NARROW)
    assert "not looked at: epoch, state_dict.steps, state_dict.bn1._extra_state" in summary


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "its arch is vit_conv_small, which timm has not"),
        ("vit_small_patch16_224", "stem of several convolutions"),
    ],
)
def test_the_convolutional_stem_of_moco_v3_is_refused(tmp_path: Path, name: str | None, message: str) -> None:
    state = renamed(ViT(12), "module.base_encoder.")
    state = {key.replace("embed.proj.", "embed.proj.0."): x for key, x in state.items()}
    torch.save({"arch": "vit_conv_small", "state_dict": state}, tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match=message):
        import_weights(tmp_path / "a.pth.tar", tmp_path / "run", name, [], TINY)


@pytest.mark.parametrize(
    ("text", "message"), [("num_heads", "need key=value"), ("{a: [", "is not YAML"), ("=3", "need")]
)
def test_arguments_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    torch.save(renamed(narrow_resnet(1), ""), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        import_weights(tmp_path / "a.pth", tmp_path / "run", "resnet18", [], [text])
