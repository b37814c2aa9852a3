"""Tensor names of other programs: the prefixes of networks in their checkpoints, and their names for layers.

The names come from these sources:

MoCo v1, v2     https://github.com/facebookresearch/moco, moco/builder.py
AdCo            https://github.com/maple-research-lab/AdCo, model/AdCo.py
MoCo v3         https://github.com/facebookresearch/moco-v3, moco/builder.py, vits.py
DINO            https://github.com/facebookresearch/dino, main_dino.py
DINOv2          https://github.com/facebookresearch/dinov2, dinov2/models/vision_transformer.py, train/ssl_meta_arch.py
MAE             https://github.com/facebookresearch/mae, models_mae.py
SwAV            https://github.com/facebookresearch/swav, src/resnet50.py
BYOL            https://github.com/lucidrains/byol-pytorch; https://github.com/yaox12/BYOL-PyTorch;
                https://github.com/sthalles/PyTorch-BYOL
SimCLR          https://github.com/sthalles/SimCLR; https://github.com/Spijkervet/SimCLR
lightly         https://github.com/lightly-ai/lightly, benchmarks/, lightly/models/resnet.py
VISSL           https://github.com/facebookresearch/vissl, vissl/models/trunks/resnext.py
mmpretrain      https://github.com/open-mmlab/mmpretrain, mmpretrain/models/backbones/vision_transformer.py
solo-learn      https://github.com/vturrisi/solo-learn, solo/methods/base.py
transformers    https://github.com/huggingface/transformers, models/vit, models/dinov2
detectron2      https://github.com/facebookresearch/moco, detection/convert-pretrain-to-detectron2.py
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # by name


class Layout(NamedTuple):
    """The prefixes of the backbones' tensor names.

    `teacher` is None for a program with one network. A checkpoint has this layout if one of its tensors has one of the
    two prefixes, and one matches the regular expression `mark`.
    """

    name: str
    student: str
    teacher: str | None = None
    mark: str = ""


# A checkpoint has the first layout that fits. Longer prefixes and rarer marks therefore come first.
LAYOUTS = (
    Layout("MoCo v1, v2 or AdCo", "encoder_q.", "encoder_k."),
    Layout("MoCo v3", "base_encoder.", "momentum_encoder.", r"^base_encoder\."),
    Layout("BYOL", "online_encoder.net.", "target_encoder.net."),
    Layout("BYOL", "online_network.encoder.", "target_network.encoder."),
    Layout("DINOv2", "student.backbone.", "teacher.backbone.", r"\.(ibot_head|dino_head|mask_token|register_tokens)\b"),
    Layout("DINO", "student.backbone.", "teacher.backbone."),
    Layout("lightly", "student_backbone.", "teacher_backbone.", r"^student_backbone\."),
    Layout("lightly", "query_backbone.", "backbone.", r"^query_backbone\."),
    Layout("lightly", "backbone.", "teacher_backbone.", r"^teacher_backbone\."),
    Layout("lightly", "backbone.", "backbone_momentum.", r"^backbone_momentum\."),
    Layout("solo-learn", "backbone.", "momentum_backbone.", r"^momentum_backbone\."),
    Layout("solo-learn", "encoder.", "momentum_encoder.", r"^momentum_encoder\."),
    Layout("lightly", "backbone.", None, r"^(projection_head|prediction_head|online_classifier|criterion)\."),
    Layout("solo-learn", "backbone.", None, r"^classifier\."),
    Layout("SimSiam", "encoder.", None, r"^encoder\.fc\.3\."),
    Layout("SimCLR", "backbone.", "ema.backbone.", r"^backbone\.fc\."),
    Layout("SimCLR", "encoder.", "ema.encoder.", r"^projector\."),
    Layout("I-JEPA", "encoder.", "target_encoder.", r"^target_encoder\."),
    Layout("a backbone in a larger model", "backbone.", "ema.backbone."),
    Layout("a backbone in a larger model", "encoder.", "ema.encoder.", r"^encoder\.(?!layers?\.|ln\.|pos_embedding$)"),
    Layout("VISSL", "trunk._feature_blocks.", None),
    Layout("a student with its teacher", "student.", "teacher."),
    Layout("SwAV", "", None, r"^prototypes\b"),
    Layout("MAE", "", "ema.", r"^decoder_pos_embed$"),
    Layout("DINOv2", "", "ema.", r"^(mask_token|register_tokens)$"),
    Layout("timm or torchvision", "", "ema."),
)

# Tensors that a checkpoint may have besides the backbone: projection heads, predictors, classifiers, decoders, queues,
# losses, tokens for masked patches, the second copy of the student in lucidrains' BYOL (`net.`), the normalisation of
# Barlow Twins (`bn.`), and the counters of thop and of torch's AveragedModel.
OTHER_TENSORS = re.compile(
    r"(^|\.)(\w+_)?(fc|heads?|head_dist|linear|classifier|projector|projection|projetion|predictor|prototypes?\d*|"
    r"decoder|criterion|loss|neck|queues?|mask(ed)?_(token|embed)|pooler)(_\w+)?(\.|$)"
    r"|^(net|bn)\.|(^|\.)(total_ops|total_params|n_averaged)$"
)

# The layers of torchvision's ResNet by their index in nn.Sequential(*resnet.children()).
_CHILDREN = (("0", "conv1"), ("1", "bn1"), ("4", "layer1"), ("5", "layer2"), ("6", "layer3"), ("7", "layer4"))

# Other names for layers: a regular expression that one of a network's tensors matches, and the replacements.
DIALECTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (r"^vit\.", ((r"^vit\.", ""),)),  # lightly's MaskedVisionTransformer, and ViTMAE of transformers
    (
        r"^class_token$",  # torchvision's VisionTransformer
        (
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
        ),
    ),
    (
        r"^(\w+\.)?embeddings\.patch_embeddings\.",  # ViT, ViTMAE and Dinov2 of transformers
        (
            (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.", ""),
            (r"^layernorm\.", "norm."),
            (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
            (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
            (r"\.attention\.q_proj\.", ".attn.query."),
            (r"\.attention\.k_proj\.", ".attn.key."),
            (r"\.attention\.v_proj\.", ".attn.value."),
            (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"(^blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.weights_in\.", ".mlp.fc1."),
            (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
        ),
    ),
    (
        r"^patch_embed\.projection\.",  # VisionTransformer of mmpretrain, mmselfsup and mmsegmentation
        (
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"^(?:ln1|norm1)\.", "norm."),
            (r"^layers\.(\d+)\.", r"blocks.\1."),
            (r"(^blocks\.\d+)\.ln(\d)\.", r"\1.norm\2."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
            (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
            (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
        ),
    ),
    (r"^blocks\.\d+\.\d+\.norm1\.", ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)),  # DINOv2's chunks of blocks
    (r"\.mlp\.w12\.", ((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))),  # DINOv2's SwiGLU
    (r"^blocks\.\d+\.gamma_1$", ((r"\.gamma_(\d)$", r".ls\1.gamma"),)),  # DeiT III and BEiT
    (r"^4\.0\.conv1\.", tuple((rf"^{index}\.", f"{name}.") for index, name in _CHILDREN)),
    (r"\.shortcut\.0\.", ((r"\.shortcut\.", ".downsample."),)),  # lightly's ResNetGenerator, and many CIFAR ResNets
)


# Tensors that timm has as one: the first, the others, and timm's name.
_MERGED = (
    (".attn.query.", (".attn.key.", ".attn.value."), ".attn.qkv."),
    (".mlp.gate_proj.", (".mlp.up_proj.",), ".mlp.fc1."),
)


def find_layout(names: set[str]) -> Layout:
    """Returns the first layout that tensors of these names have."""
    return next(
        layout
        for layout in LAYOUTS
        if any(name.startswith((layout.student, layout.teacher or layout.student)) for name in names)
        and any(re.search(layout.mark, name) for name in names)
    )


def strip_common_prefix(tensors: Tensors) -> Tensors:
    """Removes names of modules that contain everything, such as `model.` of a LightningModule."""
    prefixes = [prefix for layout in LAYOUTS for prefix in (layout.student, layout.teacher) if prefix]
    while len(first := {name.partition(".")[0] for name in tensors}) == 1:
        common = f"{first.pop()}."
        if any(prefix.startswith(common) for prefix in prefixes) or not all(
            name.startswith(common) for name in tensors
        ):
            break
        tensors = {name.removeprefix(common): x for name, x in tensors.items()}
    return tensors


def to_timm(tensors: Tensors) -> Tensors:
    """Converts the tensors of one network from another program's names to timm's."""
    for mark, replacements in DIALECTS:
        if any(re.search(mark, name) for name in tensors):
            for pattern, replacement in replacements:
                tensors = {re.sub(pattern, replacement, name): x for name, x in tensors.items()}
    for first, others, merged in _MERGED:
        tensors = _concatenate(tensors, first, others, merged)
    return _split_register_positions(tensors)


def _concatenate(tensors: Tensors, first: str, others: tuple[str, ...], merged: str) -> Tensors:
    """Concatenates tensors that are one tensor in timm."""
    result = dict(tensors)
    for name in tensors:
        parts = [name] + [name.replace(first, other) for other in others]
        if first in name and all(part in tensors for part in parts):
            result[name.replace(first, merged)] = torch.cat([result.pop(part) for part in parts])
    return result


def _split_register_positions(tensors: Tensors) -> Tensors:
    """Adds the class token's position to the token, as timm stores DINOv2 with registers (`no_embed_class`)."""
    if not {"register_tokens", "cls_token", "pos_embed"} <= tensors.keys():
        return tensors
    positions = tensors["pos_embed"]
    changed = {"cls_token": tensors["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    changed["reg_token"] = tensors["register_tokens"]
    return {name: x for name, x in tensors.items() if name != "register_tokens"} | changed


def from_torchvision_vit(name: str) -> str:
    """Converts a tensor name of torchvision's VisionTransformer to timm's."""
    for pattern, replacement in dict(DIALECTS)[r"^class_token$"]:
        name = re.sub(pattern, replacement, name)
    return name


def to_detectron2(name: str) -> str:
    """Converts a tensor name of torchvision's ResNet to detectron2's."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
