"""The backbone of a run for other programs: its weights in their naming, or the network itself.

timm            safetensors for timm.create_model(name, num_classes=0)
torchvision     safetensors for torchvision's model of that name with `fc` (`heads`) replaced by nn.Identity()
detectron2      a pickle for MODEL.WEIGHTS, as MoCo's convert-pretrain-to-detectron2.py makes it
onnx            normalised images [batch, 3, S, S] to features [batch, D]
huggingface     a folder: safetensors, timm's config.json, and a model card

Nothing is written before what can be checked here is checked: for torchvision and detectron2 that torchvision's own
network gives the same features with these weights, for ONNX that onnxruntime does.
"""

import logging
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from safetensors.torch import save
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.normalize import MEAN, STD
from trainer import distributed
from trainer.config import Config
from trainer.interop.layouts import from_torchvision_vit, to_detectron2
from trainer.interop.model_card import model_card
from trainer.interop.weights import CheckpointChoice, differences, load_encoder
from trainer.run.directory import read_config

Format = Literal["timm", "torchvision", "detectron2", "onnx", "huggingface"]

TOLERANCE = 1e-4  # of the largest feature: another order of the same sums


@torch.no_grad()
def export(run: Path, to: Format, out: Path, which: CheckpointChoice, licence: str) -> str:
    """Write the backbone of a run to `out`, a new file or folder; says how to load it. See the module.

    licence: for the model card, an identifier of Hugging Face's. Raises ValueError where `out` exists, where there is
    no such network, and where the format cannot hold it.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, nothing is overwritten")
    config = read_config(run)
    with distributed.process_group("cpu") as rank_info:
        encoder, step = load_encoder(run, config, which)
        if rank_info.rank > 0:
            return ""
    backbone = encoder.backbone.eval().requires_grad_(False)
    size = config.eval.size or config.data.views[0].size
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if to == "timm":
            partial.write_bytes(save(_contiguous(backbone), {"format": "pt"}))
            told = _how_in_timm(config, out)
        elif to == "torchvision":
            partial.write_bytes(save(torchvision_weights(backbone, config, size), {"format": "pt"}))
            told = f"torchvision's {_plain_name(config)}, its last layer replaced by nn.Identity()"
        elif to == "detectron2":
            weights = detectron2_weights(backbone, config, size)
            with partial.open("wb") as file:
                stored = {"model": weights, "__author__": "AdCo trainer", "matching_heuristics": True}
                _OldNumpy(file, protocol=4).dump(stored)
            told = "MODEL.WEIGHTS of detectron2, with RESNETS.STRIDE_IN_1X1 False and INPUT.FORMAT RGB"
        elif to == "onnx":
            write_onnx(backbone, size, partial)
            told = f"images, float32 [batch, 3, {size}, {size}] to features, checked in onnxruntime"
        else:
            partial.mkdir()
            _write_folder(backbone, config, size, partial)
            card = model_card(run, config, which.network, step, backbone, size, licence)
            (partial / "README.md").write_text(card, encoding="utf-8")
            told = f"timm.create_model('local-dir:{out}', pretrained=True)"
        os.rename(partial, out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    return f"{out}: the {which.network} of {run}" + (f" after {step:,} steps" if step else "") + f"; for {told}"


def torchvision_weights(backbone: nn.Module, config: Config, size: int) -> dict[str, Tensor]:
    """By torchvision's names. Raises ValueError where it has no such network, or its one gives other features."""
    _refuse_small_stem(backbone, config, "torchvision")
    weights = _contiguous(backbone)
    twin = _torchvision_twin(backbone, config)
    names = {name: from_torchvision_vit(name) for name in twin.state_dict()}
    if difference := differences(weights, {names[name]: x for name, x in twin.state_dict().items()}):
        raise ValueError(f"torchvision's {_plain_name(config)} is another network: {difference}")
    renamed = {name: weights[ours] for name, ours in names.items()}
    twin.load_state_dict(renamed)
    x_BCHW = _probe(twin.image_size if isinstance(backbone, VisionTransformer) else size)
    _check_same(backbone(x_BCHW), twin.eval()(x_BCHW), f"torchvision's {_plain_name(config)}")
    return renamed


def detectron2_weights(backbone: nn.Module, config: Config, size: int) -> dict[str, Any]:
    """numpy arrays by detectron2's names. Raises ValueError for what is not torchvision's ResNet."""
    if not isinstance(backbone, ResNet):
        raise ValueError(f"detectron2 has ResNets only, the backbone is {config.model.backbone}")
    weights = torchvision_weights(backbone, config, size)
    # It uses the running statistics as they are, and has no counter.
    return {to_detectron2(name): x.numpy() for name, x in weights.items() if not name.endswith("num_batches_tracked")}


class _OldNumpy(pickle.Pickler):
    """Arrays for any numpy: those that numpy 2 pickles cannot be read by what detectron2 is often run with."""

    def reducer_override(self, x: Any) -> Any:
        return (np.ndarray, (x.shape, x.dtype.str, bytearray(x.tobytes()))) if type(x) is np.ndarray else NotImplemented


def write_onnx(backbone: nn.Module, size: int, path: Path) -> None:
    """Raises ValueError where onnxruntime's features are others."""
    import onnx
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    x_BCHW = _probe(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program = torch.onnx.export(
            backbone, (x_BCHW,), dynamo=True, input_names=["images"], output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {"mean": str(list(MEAN)), "std": str(list(STD)), "range": "[0, 1]"})
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):  # others than the one it was made with
        x_BCHW = _probe(size, batch)
        (found,) = session.run(["features"], {"images": x_BCHW.numpy()})
        _check_same(backbone(x_BCHW), torch.from_numpy(found), "onnxruntime")


def _write_folder(backbone: Any, config: Config, size: int, folder: Path) -> None:
    _refuse_small_stem(backbone, config, "Hugging Face's folder is loaded by timm, which")
    data = {
        "input_size": (3, size, size),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 224 / 256,  # `data.cpu.render_center`
    }
    # Nothing of the weights that timm itself has under this name, but for what is of the network.
    stated = ("architecture", "num_classes", "first_conv", "classifier", "pool_size", "fixed_input_size", "input_size")
    backbone.pretrained_cfg = {name: x for name, x in backbone.pretrained_cfg.items() if name in stated}
    timm.models.save_for_hf(backbone, str(folder), safe_serialization=True, data_config=data)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it is made for its owner only


def _torchvision_twin(backbone: nn.Module, config: Config) -> Any:
    """torchvision's network of the same shape with fresh weights, giving features."""
    import torchvision

    if isinstance(backbone, VisionTransformer):
        block, patch = backbone.blocks[0], backbone.patch_embed
        if patch.img_size[0] != patch.img_size[1] or patch.patch_size[0] != patch.patch_size[1]:
            raise ValueError(f"torchvision has no ViT of {patch.img_size} pixels in patches of {patch.patch_size}")
        twin = torchvision.models.VisionTransformer(
            image_size=patch.img_size[0], patch_size=patch.patch_size[0], num_layers=len(backbone.blocks),
            num_heads=block.attn.num_heads, hidden_dim=backbone.embed_dim, mlp_dim=block.mlp.fc1.out_features,
        )  # fmt: skip
        twin.heads = nn.Identity()
        return twin
    name = _plain_name(config)
    if not isinstance(backbone, ResNet) or name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no {name} that is the same network; ResNets and ViTs can be exported to it")
    twin = torchvision.models.get_model(name)
    twin.fc = nn.Identity()
    return twin


def _refuse_small_stem(backbone: nn.Module, config: Config, who: str) -> None:
    if config.model.small_images and not isinstance(backbone, VisionTransformer):  # whose patches are an argument
        raise ValueError(
            f"{who} has no ResNet with a stem for small images (model.small_images, "
            f"stem_stride {config.model.stem_stride}): its own has a 7 x 7 convolution of stride 2 and a max pooling; "
            "take --format timm or onnx"
        )


def _plain_name(config: Config) -> str:
    return config.model.backbone.split(".")[0]


def _how_in_timm(config: Config, out: Path) -> str:
    arguments = "".join(f", {name}={value!r}" for name, value in config.model.backbone_args.items())
    how = f"timm.create_model('{config.model.backbone}', num_classes=0{arguments}, checkpoint_path='{out}')"
    if config.model.small_images and config.model.backbone.startswith(("vit", "deit")):
        return how.replace(", checkpoint_path", ", patch_size=4, checkpoint_path") if "patch_size" not in how else how
    if config.model.small_images:
        conv = f"nn.Conv2d(3, conv1.out_channels, 3, {config.model.stem_stride}, padding=1, bias=False)"
        how = how.replace(f", checkpoint_path='{out}'", "")
        return f"{how} once its conv1 is {conv} and its maxpool nn.Identity()"
    return how


def _contiguous(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: x.contiguous() for name, x in backbone.state_dict().items()}


def _probe(size: int, batch: int = 2) -> Tensor:
    """Images to compare networks by."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _check_same(ours_BD: Tensor, theirs_BD: Tensor, who: str) -> None:
    difference = float((ours_BD - theirs_BD).abs().max() / ours_BD.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"{who} gives other features: they differ by {difference:.3g} of the largest")
