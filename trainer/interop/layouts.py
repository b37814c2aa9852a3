"""Tensor names of other programs: the prefixes of networks in their checkpoints, and their names for layers.

The prefixes come from these sources:

MoCo v1, v2     https://github.com/facebookresearch/moco, moco/builder.py
AdCo            https://github.com/maple-research-lab/AdCo, model/AdCo.py
MoCo v3         https://github.com/facebookresearch/moco-v3, moco/builder.py, vits.py
DINO            https://github.com/facebookresearch/dino, main_dino.py
BYOL            https://github.com/lucidrains/byol-pytorch; https://github.com/yaox12/BYOL-PyTorch;
                https://github.com/sthalles/PyTorch-BYOL
SimCLR          https://github.com/sthalles/SimCLR; https://github.com/Spijkervet/SimCLR
detectron2      https://github.com/facebookresearch/moco, detection/convert-pretrain-to-detectron2.py
"""

import re
from typing import NamedTuple


class Layout(NamedTuple):
    """The prefixes of the backbones' tensor names; `teacher` is None for a program with one network."""

    name: str
    student: str
    teacher: str | None


# A checkpoint has the first layout whose student prefix occurs in it. Longer prefixes therefore come first.
LAYOUTS = (
    Layout("MoCo v1, v2 or AdCo", "encoder_q.", "encoder_k."),
    Layout("MoCo v3", "base_encoder.", "momentum_encoder."),
    Layout("BYOL", "online_encoder.net.", "target_encoder.net."),
    Layout("BYOL", "online_network.encoder.", "target_network.encoder."),
    Layout("DINO", "student.backbone.", "teacher.backbone."),
    Layout("SimCLR", "backbone.", None),
    Layout("SimCLR", "encoder.", None),
    Layout("timm or torchvision", "", None),
)

# Tensors that a checkpoint may have besides the backbone: projection heads, predictors, classifiers, queues, and the
# second copy of the student in lucidrains' BYOL (`net.`).
OTHER_TENSORS = re.compile(
    r"(^|\.)(fc|head|heads|head_dist|classifier|projector|projection|projetion|predictor|online_predictor)\."
    r"|^queue(_ptr)?$|^net\."
)

# The layers of torchvision's ResNet by their index in nn.Sequential(*resnet.children()).
_RESNET_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(^blocks\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"(^blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"(^blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"(^blocks\.\d+)\.mlp\.(?:linear_1|0)\.", r"\1.mlp.fc1."),
    (r"(^blocks\.\d+)\.mlp\.(?:linear_2|3)\.", r"\1.mlp.fc2."),
)


def is_torchvision_vit(names: set[str]) -> bool:
    """Return whether the tensor names are those of torchvision's VisionTransformer."""
    return {"class_token", "conv_proj.weight"} <= names


def from_torchvision_vit(name: str) -> str:
    """Converts a tensor name of torchvision's VisionTransformer to timm's."""
    for pattern, replacement in _TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def from_resnet_children(name: str) -> str:
    """Converts a tensor name of nn.Sequential(*resnet.children()) to torchvision's; other names stay unchanged."""
    child, dot, rest = name.partition(".")
    return _RESNET_CHILDREN.get(child, child) + dot + rest


def to_detectron2(name: str) -> str:
    """Converts a tensor name of torchvision's ResNet to detectron2's."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
