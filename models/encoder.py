"""The encoder: a timm backbone, the projection head of SimCLR, MoCo and AdCo, and BYOL's predictor."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Maps images to unit embeddings: a backbone, a projection head and, for some methods, a predictor.

    Attributes:
        backbone_args: All arguments that the backbone was built with: the given ones, and those for any image size and
            for small images.
        keeps_features: Whether each forward pass keeps the backbone's features.
        features_NF: These features of the last forward pass, detached [V * B, F]; None if there are none.
    """

    def __init__(
        self,
        backbone: str | Callable[..., nn.Module],
        *,
        dim: int = 128,
        hidden: int | None = None,
        head_layers: int = 2,
        head_norm: bool = False,
        head_final_norm: bool = False,
        head_bias: bool = True,
        predictor: int | None = None,
        small_images: bool = False,
        stem_stride: int = 1,
        stem_padding: int = 1,
        backbone_args: dict | None = None,
    ) -> None:
        """Build an encoder with random weights.

        Args:
            backbone: Any name that `timm.create_model` knows; or a function that takes `backbone_args` and returns a
                module of images [B, 3, S, S] to features [B, F], with F in its attribute `num_features`.
            dim: Dimensions of an embedding.
            hidden: Width of the head's hidden layers; None for the number of the backbone's features.
            head_layers: Number of linear layers of the head.
            head_norm: Whether the head's hidden layers have BatchNorm, as in SimCLR and BYOL but not in MoCo v2 and
                AdCo.
            head_final_norm: Whether head and predictor end with a BatchNorm without scale and bias (MoCo v3; SimCLR's
                has a scale).
            head_bias: Whether the last linear layers of head and predictor have a bias; never with head_final_norm.
            predictor: Width of the hidden layer of a predictor, a second head with BatchNorm on top of the first (BYOL,
                arXiv 2006.07733, sec. 3.3); None for no predictor.
            small_images: Adapts the stem to images of about 32 pixels. A ResNet gets a 3 x 3 convolution and no max
                pooling, a ViT gets patches of 4 pixels.
            stem_stride: Stride of that convolution: 1 as in SimCLR's CIFAR experiments (app. B.9), 2 for a quarter of
                work.
            stem_padding: Padding of that convolution; solo-learn has 2 for its CIFAR experiments.
            backbone_args: Further arguments of `timm.create_model`.

        Raises:
            ValueError: If the backbone is unknown, does not take the arguments or has no stem for small images.
        """
        super().__init__()
        self.backbone_args = dict(backbone_args or {})
        self.backbone = (
            _create_model(backbone, self.backbone_args, small_images, stem_stride, stem_padding)
            if isinstance(backbone, str)
            else _call(backbone, self.backbone_args, small_images)
        )
        # Some models (MobileNetV3) have a further layer after pooling.
        features = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        widths = [features, *[hidden or features] * (head_layers - 1), dim]
        self.head = _layers(widths, head_norm, head_final_norm, head_bias)
        self.predictor = _layers([dim, predictor, dim], True, head_final_norm, head_bias) if predictor else None
        self.keeps_features = False
        self.features_NF: Tensor | None = None

    def forward(self, views: list[Tensor]) -> Tensor:
        """Embed V views [B, 3, S_v, S_v] one after the other: unit rows [V * B, D], fp32.

        With a predictor, the rows are predictions. All views come in one call, so that a wrapper such as DDP sees one
        forward for each backward.
        """
        # Each view is its own batch to BatchNorm, as in AdCo's code.
        embeddings, features = [], []
        for view in views:
            x_BF = self.backbone(view)
            z_BD = self.head(x_BF)
            embeddings.append(self.predictor(z_BD) if self.predictor else z_BD)
            features.append(x_BF.detach())
        if self.keeps_features:
            self.features_NF = torch.cat(features)
        return F.normalize(torch.cat(embeddings).float(), dim=1)


def _create_model(name: str, arguments: dict[str, Any], small_images: bool, stem_stride: int, stem_padding: int) -> Any:
    """Build a model of timm, and add to `arguments` what it needs for any image size and for small images."""
    # Importing timm takes as long as importing torch, and commands that only read a configuration do not need it.
    import timm

    def create() -> Any:
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments)

    is_vit = name.startswith(("vit_", "deit"))
    any_size = is_vit and "dynamic_img_size" not in arguments
    if any_size:
        arguments["dynamic_img_size"] = True  # for crops of several sizes
    if is_vit and small_images:
        arguments.setdefault("patch_size", 4)
    try:
        try:
            backbone = create()
        except TypeError as error:
            # ViTs with relative positions (vit_relpos_*, vit_srelpos_*) have a fixed size and lack the argument.
            if not any_size or "'dynamic_img_size'" not in str(error):
                raise
            del arguments["dynamic_img_size"]
            backbone = create()
    except RuntimeError as error:
        raise ValueError(f"model.backbone: timm has no model {name!r} ({error})") from error
    except (TypeError, AssertionError) as error:  # timm asserts that the heads divide the width
        raise ValueError(
            f"model.backbone_args: {name} does not take {arguments} ({error}); model.backbone_args={{}} gives none"
        ) from error
    if small_images and not is_vit:
        _shrink_stem(backbone, name, stem_stride, stem_padding)
    return backbone


def _call(build: Callable[..., nn.Module], arguments: dict[str, Any], small_images: bool) -> Any:
    """Build a backbone from outside, and check what the trainer needs of it."""
    name = getattr(build, "__name__", str(build))
    if small_images:
        raise ValueError(f"model.small_images: is for models of timm; give {name} an argument in model.backbone_args")
    if not inspect.isfunction(build) and not inspect.isclass(build):
        raise ValueError(f"model.backbone: {name} is {type(build).__name__}, need a function or class")
    try:
        inspect.signature(build).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.backbone_args: {name} does not take {arguments} ({error})") from error
    backbone = build(**arguments)
    if not isinstance(backbone, nn.Module) or not isinstance(getattr(backbone, "num_features", None), int):
        raise ValueError(f"model.backbone: {name} returned {type(backbone).__name__}, need a module with num_features")
    return backbone


def _layers(widths: list[int], norm: bool, final_norm: bool, bias: bool) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them."""
    modules: list[nn.Module] = []
    # A bias before BatchNorm has no effect, since BatchNorm subtracts the mean.
    for inputs, outputs in pairwise(widths[:-1]):
        modules += [nn.Linear(inputs, outputs, bias=not norm)]
        modules += [nn.BatchNorm1d(outputs)] if norm else []
        modules += [nn.ReLU(inplace=True)]
    modules += [nn.Linear(widths[-2], widths[-1], bias=bias and not final_norm)]
    modules += [nn.BatchNorm1d(widths[-1], affine=False)] if final_norm else []
    return nn.Sequential(*modules)


def _shrink_stem(backbone: nn.Module, name: str, stride: int, padding: int) -> None:
    conv = getattr(backbone, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise ValueError(f"model.small_images: {name} has no ResNet or ViT stem; need false for this backbone")
    backbone.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride, padding, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()
