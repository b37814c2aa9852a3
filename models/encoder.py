"""The encoder: a timm backbone, the two-layer projection head of SimCLR, MoCo v2 and AdCo, and BYOL's predictor."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """Images to unit embeddings.

    backbone: any name `timm.create_model` knows; backbone_args go to it as they are.
    dim: length of an embedding. hidden: width of the head's hidden layer, the backbone's own if None.
    head_norm: BatchNorm in the head's hidden layer, as SimCLR and BYOL have it and MoCo and AdCo have not.
    predictor: width of the hidden layer of a second such head on top of the first, with BatchNorm (BYOL, arXiv
        2006.07733, sec. 3.3); None: there is none.
    small_images: for images of about 32 pixels. A ResNet gets a 3 x 3 stem of stride `stem_stride` and no max
        pooling (1: as in the CIFAR experiments of SimCLR, app. B.9; 2: a quarter of the work), a ViT gets patches
        of 4 pixels.
    Raises ValueError for an unknown backbone, for arguments it does not take, and for one that has no
    known stem for small images.
    """

    def __init__(
        self,
        backbone: str,
        *,
        dim: int = 128,
        hidden: int | None = None,
        head_norm: bool = False,
        predictor: int | None = None,
        small_images: bool = False,
        stem_stride: int = 1,
        backbone_args: dict | None = None,
    ) -> None:
        super().__init__()
        arguments = dict(backbone_args or {})
        is_vit = backbone.startswith(("vit_", "deit"))
        if is_vit:
            arguments.setdefault("dynamic_img_size", True)  # crops of several sizes
            if small_images:
                arguments.setdefault("patch_size", 4)
        try:
            self.backbone = timm.create_model(backbone, pretrained=False, num_classes=0, **arguments)
        except RuntimeError as error:
            raise ValueError(f"model.backbone: timm has no model {backbone!r} ({error})") from error
        except TypeError as error:
            raise ValueError(f"model.backbone_args: {backbone} does not take {arguments} ({error})") from error
        if small_images and not is_vit:
            _shrink_stem(self.backbone, backbone, stem_stride)
        # Some models (MobileNetV3) widen their features once more after pooling.
        features = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        self.head = _two_layers(features, hidden or features, dim, head_norm)
        self.predictor = _two_layers(dim, predictor, dim, True) if predictor else None

    def forward(self, views: list[Tensor]) -> Tensor:
        """Embed views one after the other: V tensors [B, 3, S_v, S_v] to unit rows [V * B, D], fp32.

        With a predictor they are predictions.

        One call for all views, so that a wrapper such as DDP sees one forward for one backward.
        """
        # Apart on purpose: each view is its own batch to BatchNorm, as in the reference implementation.
        z_ND = torch.cat([self._embed(view) for view in views])
        return F.normalize(z_ND.float(), dim=1)

    def _embed(self, view: Tensor) -> Tensor:
        z_BD: Tensor = self.head(self.backbone(view))
        return self.predictor(z_BD) if self.predictor else z_BD


def _two_layers(inputs: int, hidden: int, outputs: int, norm: bool) -> nn.Sequential:
    between: list[nn.Module] = [nn.BatchNorm1d(hidden)] if norm else []
    # No bias in front of BatchNorm, which takes the mean away.
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=not norm), *between, nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


def _shrink_stem(backbone: nn.Module, name: str, stride: int) -> None:
    conv = getattr(backbone, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise ValueError(f"model.small_images: {name} has no ResNet or ViT stem; need false for this backbone")
    backbone.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()
