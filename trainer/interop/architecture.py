"""Finds what a checkpoint's tensors leave open: the name of the network and the arguments for timm's create_model.

The number of attention heads, the stride and padding of a convolution or the pooling show in no tensor. They come from
these sources, in this order: the user, the settings in the file, public code that is known to write such files, and the
definition of the named timm model. What is still open is an error that says what to give.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data.normalize import MEAN, STD
from models.encoder import Encoder
from trainer.config import Model
from trainer.interop.layouts import Layout, Tensors


class Architecture(NamedTuple):
    """The values of section `model` and `eval` that a checkpoint needs, and where each of them comes from."""

    model: dict[str, Any]
    size: int | None
    notes: list[str]


# timm's name for the names that other programs use: a regular expression, and the name with P for the patch size.
_NAMES = (
    (r"(?:vit|deit)_(tiny|small|base|large)", r"vit_\1_patchP_224"),
    (r"(?:mae_)?vit_(base|large|huge)_patch(\d+)(?:_dec\w+)?", r"vit_\1_patch\2_224"),
    (r"xcit_(\w+_p\d+)", r"xcit_\1_224"),
    (r"swin_(tiny|small|base|large)", r"swin_\1_patch4_window7_224"),
    (r"convnext_(tiny|small|base|large)", r"convnext_\1"),
)
_NAME_KEYS = r"(arch|architecture|model|model_name|backbone|encoder|base_model|net|network)(\.(name|arch|backbone))?"
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}

# Sizes for which public code has several numbers of attention heads: 12 in MoCo v3 and in solo-learn's MoCo v3 and MAE.
_HEADS = {"tiny": "3 or 12", "small": "6 or 12"}


# Names of lightly's ResNetGenerator, and of the nn.Sequential of its children, which lacks the ReLU after bn1.
_GENERATOR = r"(^|\.)layer\d\.0\.shortcut\.0\."
_GENERATOR_CHILDREN = r"(^|\.)2\.0\.conv1\."

_CAFFE = r"\bstyle\s*=\s*['\"]caffe"  # in the settings of OpenMMLab's programs

# Values of model_type in transformers' config.json whose networks timm has.
_TRANSFORMERS = ("vit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers")

# timm's names for the activations of transformers; the networks of timm have gelu.
_ACTIVATIONS = {"gelu": None, "gelu_python": None, "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# Layouts whose public code normalises images by ImageNet's mean and standard deviation.
_IMAGENET = (
    *("MoCo v1, v2 or AdCo", "MoCo v3", "DINO", "DINOv2", "MAE", "SwAV", "SimSiam", "I-JEPA", "VISSL"),
    "lightly",
)


def backbone_name(settings: dict[str, Any], layout: Layout, tensors: Tensors) -> tuple[str, bool]:
    """Finds timm's name of the backbone.

    Args:
        settings: The plain values in the file.
        layout: The layout of the file.
        tensors: The tensors of a backbone by timm's names.

    Returns:
        The name or '', and whether the file has exactly this name, so that timm's definition of it holds.
    """
    patches = [x for key, x in settings.items() if re.search(r"(^|\.)patch_size$", key) and isinstance(x, int)]
    for key, value in settings.items():
        names = (key, key.partition(".")[2])  # also inside args, hyper_parameters, config, …
        if not isinstance(value, str) or not any(re.fullmatch(_NAME_KEYS, name) for name in names):
            continue
        if timm.is_model(value.partition(".")[0]):
            return value, True
        for pattern, replacement in _NAMES:
            name = re.sub(f"^{pattern}$", replacement, value).replace("patchP", f"patch{patches[0] if patches else 16}")
            if timm.is_model(name):
                return name, False
    width, model_type = tensors["cls_token"].shape[-1] if "cls_token" in tensors else 0, settings.get("model_type", "")
    size = _WIDTHS.get(width, "base")
    patch = tensors["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in tensors else 0
    if (layout.name == "DINOv2" and width in _WIDTHS and patch == 14) or (model_type.startswith("dinov2") and width):
        return f"vit_{size}_patch14{'_reg4' if 'reg_token' in tensors else ''}_dinov2", False
    if model_type and model_type not in _TRANSFORMERS:
        raise ValueError(f"model_type {model_type} of transformers is not read, only {', '.join(_TRANSFORMERS)}")
    if model_type and width:
        return f"vit_{size}_patch{14 if size == 'huge' else 16}_224", False
    return "", False


def find_architecture(
    settings: dict[str, Any], layout: Layout, tensors: Tensors, names: set[str], name: str, named: bool, given: Model
) -> Architecture:
    """Finds the values of section `model` besides the name.

    Args:
        settings: The plain values in the file.
        layout: The layout of the file.
        tensors: The tensors of a backbone by timm's names.
        names: The names of all tensors in the file.
        name: timm's name of the backbone.
        named: Whether the user or the file gave exactly this name.
        given: The section with what the user gave. These values stay.

    Raises:
        ValueError: Something is open. The message says what, and what to give.
    """
    if "patch_embed.proj.0.weight" in tensors:
        raise ValueError("it is a ViT with a stem of several convolutions (MoCo v3's vit_conv_…), which timm has not")
    notes: list[str] = []
    arguments = _stored_arguments(settings, name) | given.backbone_args
    backbone = _shapes_only(name, given, arguments)
    found: dict[str, Any] = {}
    if isinstance(backbone, VisionTransformer):
        nominal = not named and "model_type" in settings
        heads = [] if "num_heads" in arguments else _vit_heads(settings, layout, tensors, name, named, backbone)
        for key, value, source in (
            *heads,
            *_vit_activation(settings),
            *_vit_shapes(tensors, backbone, nominal),
        ):
            if key == "img_size" and key in given.backbone_args:
                raise ValueError(
                    f"img_size={given.backbone_args[key]} was given, but the file has position embeddings for {value} "
                    "pixels: leave it out, images of other sizes are interpolated at run time"
                )
            if key not in arguments:
                arguments[key] = value
                notes.append(f"{key}={value} ({source})")
        found["backbone_args"] = arguments
        eps = getattr(backbone.norm, "eps", None)
        if settings.get("layer_norm_eps", eps) != eps:
            notes.append(f"layer norms add {eps}, the file's network added {settings['layer_norm_eps']}")
        (size, _) = _shapes_only(name, given, arguments).patch_embed.img_size
        if "_dinov2" in name:
            size = 224  # DINOv2 evaluates at 224 pixels with position embeddings for 518
    else:
        if any(re.search(_GENERATOR_CHILDREN, name) for name in names):
            raise ValueError(
                "this is nn.Sequential(*ResNetGenerator(…).children()) of lightly, which has no ReLU after its first "
                "BatchNorm because that ReLU is not among the children; timm has no such network"
            )
        if any(re.search(_CAFFE, f"{key}='{value}'") for key, value in settings.items()):
            raise ValueError(
                "it is a ResNet with the stride in the 1 x 1 convolution of a bottleneck (style caffe); timm has it in "
                "the 3 x 3 convolution, with tensors of the same shapes and other features"
            )
        stem = _resnet_stem(tensors, names, backbone) if "small_images" not in given.model_fields_set else {}
        notes += [f"model.{key}={value} (lightly's ResNetGenerator)" for key, value in stem.items()]
        found |= {"backbone_args": arguments, **stem}
        size = settings.get("pretrained_cfg.input_size", [32 if stem else None])[-1]
    return Architecture(found, size, notes)


def _shapes_only(name: str, given: Model, arguments: dict[str, Any]) -> Any:
    """Returns a backbone whose tensors have shapes but no values."""
    with torch.device("meta"):
        return Encoder(
            name, small_images=given.small_images, stem_stride=given.stem_stride, backbone_args=arguments
        ).backbone


def _stored_arguments(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the arguments that timm stores in config.json, if they belong to this name."""
    if settings.get("architecture") != name:
        return {}
    return {key: x for key, x in settings.get("model_args", {}).items() if key != "num_classes"}


def _vit_heads(
    settings: dict[str, Any], layout: Layout, tensors: Tensors, name: str, named: bool, backbone: VisionTransformer
) -> list[tuple[str, Any, str]]:
    """Returns the number of attention heads if it is not the named model's, or if the name alone says it."""
    usual = backbone.blocks[0].attn.num_heads
    for key, value in settings.items():
        if re.search(r"(^|\.)num_(attention_)?heads$", key) and "decoder" not in key and isinstance(value, int):
            return [("num_heads", value, "the file's settings")] if value != usual else []
    if not (heads := next((heads for size, heads in _HEADS.items() if f"_{size}_" in name), "")):
        return []
    positions = position_kind(tensors)
    if "MoCo v3" in (layout.name, positions):
        return [("num_heads", 12, "MoCo v3's ViT-S and ViT-Ti")]
    if layout.name in ("DINO", "DINOv2") or "dinov2" in name:
        return []
    if named and not positions:
        return [("num_heads", usual, f"timm's {name}; public code has {heads}")]
    raise ValueError(
        f"the number of attention heads is open: {name} has {heads} in public code (12 in MoCo v3, and in solo-learn's "
        "MoCo v3 and MAE), and no tensor shows it. Give it: --backbone-args num_heads=N"
    )


def position_kind(tensors: Tensors) -> str:
    """Returns MoCo v3 or MAE if the position embeddings are their fixed sines and cosines, or ''.

    Both have four blocks of channels. MoCo v3 (vits.py) begins with the row of a patch, MAE (util/pos_embed.py) with
    its column.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.dim() != 3 or positions.shape[-1] % 4:
        return ""
    side, quarter = int((positions.shape[1] - 1) ** 0.5), positions.shape[-1] // 4
    if side * side != positions.shape[1] - 1:
        return ""
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    row = waves.repeat_interleave(side, dim=0)
    column = waves.repeat(side, 1)
    for kind, expected in (("MoCo v3", (row, column)), ("MAE", (column, row))):
        if (positions[0, 1:].float() - torch.cat(expected, dim=1)).abs().max() < 0.02:
            return kind
    return ""


def _vit_activation(settings: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Returns the activation that transformers stores if it is not that of timm's networks."""
    stored = settings.get("hidden_act", "gelu") if "model_type" in settings else "gelu"
    activation = _ACTIVATIONS.get(stored, stored)
    return [("act_layer", activation, "the file's settings")] if activation else []


def _vit_shapes(tensors: Tensors, backbone: VisionTransformer, nominal: bool) -> list[tuple[str, Any, str]]:
    """Returns the arguments that the shapes of a ViT's tensors show and that the named model has not.

    Args:
        tensors: The tensors by timm's names.
        backbone: The named model.
        nominal: Whether the name was derived from the width only, so that depth and widths may differ, too.
    """
    shapes = {name: x.shape for name, x in tensors.items()}
    block, patches = backbone.blocks[0], backbone.patch_embed
    if len(shapes.get("patch_embed.proj.weight", ())) != 4 or "blocks.0.mlp.fc1.weight" not in shapes:
        return []  # the check of all names and shapes says what differs
    if "cls_token" not in shapes and backbone.cls_token is not None:
        raise ValueError(
            "the file has no class token, so the pooling is open: give --backbone-args class_token=false "
            "--backbone-args global_pool=avg --backbone-args fc_norm=false, or --backbone vit_…_gap_…"
        )
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    values: dict[str, tuple[Any, Any]] = {  # the file's, and the named model's
        "init_values": (
            1e-5 if "blocks.0.ls1.gamma" in shapes else None,
            1e-5 if hasattr(block.ls1, "gamma") else None,
        ),
        "qk_norm": ("blocks.0.attn.q_norm.weight" in shapes, hasattr(block.attn.q_norm, "weight")),
        "qkv_bias": ("blocks.0.attn.qkv.bias" in shapes, block.attn.qkv.bias is not None),
        "pre_norm": ("norm_pre.weight" in shapes, hasattr(backbone.norm_pre, "weight")),
        "reg_tokens": (shapes["reg_token"][1] if "reg_token" in shapes else 0, backbone.num_reg_tokens),
        "global_pool": ("avg" if "fc_norm.weight" in shapes else backbone.global_pool, backbone.global_pool),
    }
    if nominal:
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name))
        values["embed_dim"] = (width, backbone.embed_dim)
        values["depth"] = (depth, len(backbone.blocks))
        values["patch_size"] = (patch, patches.patch_size[0])
        values["mlp_ratio"] = (hidden / width, block.mlp.fc1.out_features / backbone.embed_dim)
    if "pos_embed" in shapes:
        total = shapes["pos_embed"][1]
        tokens = int("cls_token" in shapes) + values["reg_tokens"][0]
        for without in (backbone.no_embed_class, not backbone.no_embed_class):  # positions of patches only?
            side = math.isqrt(total - (0 if without else tokens))
            if side**2 == total - (0 if without else tokens):
                values["no_embed_class"] = (without, backbone.no_embed_class)
                values["img_size"] = (side * patch, patches.img_size[0])
                break
    return [(key, ours, "as its tensors show") for key, (ours, named) in values.items() if ours != named]


def _resnet_stem(tensors: Tensors, names: set[str], backbone: nn.Module) -> dict[str, Any]:
    """Returns the settings of a ResNet's stem for small images, {} for the usual one. `names` are the file's."""
    conv = getattr(backbone, "conv1", None)
    weight = tensors.get("conv1.weight")
    if weight is None or not isinstance(conv, nn.Conv2d) or weight.shape[-1] != 3 or conv.kernel_size[0] == 3:
        return {}
    if any(re.search(_GENERATOR, name) for name in names):
        return {"small_images": True}
    raise ValueError(
        "conv1 is a 3 x 3 convolution for small images, and no tensor shows its stride and its padding. "
        "Give model.small_images=true, also model.stem_stride=2 if it has stride 2, and model.stem_padding=2 if it is "
        "solo-learn's (stride 1, padding 2, no max pooling)"
    )


def normalisation(settings: dict[str, Any], layout: Layout, name: str) -> tuple[Sequence[float], ...] | None:
    """Returns the mean and standard deviation of the images that the network was trained with, None if unknown.

    They are in the file's settings, in timm's for a name with the tag of pretrained weights, or those of public code.
    """
    if settings.get("do_normalize") is False:
        return (0, 0, 0), (1, 1, 1)
    for mean, std in (("pretrained_cfg.mean", "pretrained_cfg.std"), ("image_mean", "image_std")):
        if mean in settings and std in settings:
            return settings[mean], settings[std]
    if "." in name and (known := timm.models.get_pretrained_cfg(name)):
        return known.mean, known.std
    return (MEAN, STD) if layout.name in _IMAGENET else None


def to_imagenet_statistics(tensors: Tensors, mean: Sequence[float], std: Sequence[float]) -> Tensors:
    """Changes a ViT's patch embedding for images that are normalised by ImageNet's statistics, as all are here.

    The embedding of (pixel - mean) / std is a linear function of (pixel - MEAN) / STD, and it has no padding.

    Args:
        tensors: The tensors of a network, a ViT's as `backbone.*` with timm's names.
        mean: Mean of each colour in [0, 1] that was subtracted in training.
        std: Standard deviation that the difference was divided by.
    """
    weight, bias = (tensors[f"backbone.patch_embed.proj.{name}"].double() for name in ("weight", "bias"))
    scale = torch.tensor(STD).double() / torch.tensor(std).double()
    shift = (torch.tensor(MEAN).double() - torch.tensor(mean).double()) / torch.tensor(std).double()
    changed = {
        "backbone.patch_embed.proj.weight": weight * scale[:, None, None],
        "backbone.patch_embed.proj.bias": bias + (weight.sum((2, 3)) * shift).sum(1),
    }
    return tensors | {name: x.to(tensors[name].dtype) for name, x in changed.items()}
