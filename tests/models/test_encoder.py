"""The encoder: what it gives for several views, and which backbones it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from models.encoder import Encoder
from trainer.evaluate.features import evaluation_mode

RESNET = {"channels": (8, 16, 16, 32)}
VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}


def resnet(small_images: bool = True) -> Encoder:
    torch.manual_seed(0)
    return Encoder("resnet18", dim=16, small_images=small_images, backbone_args=RESNET)


def vit(small_images: bool = True) -> Encoder:
    torch.manual_seed(0)
    return Encoder("vit_tiny_patch16_224", dim=16, small_images=small_images, backbone_args=VIT)


@pytest.mark.parametrize("make", [resnet, vit])
def test_unit_rows_in_the_order_of_the_views(make: Callable[[], Encoder]) -> None:
    encoder = make().eval()
    views = [torch.rand(3, 3, 32, 32) for _ in range(2)]
    rows = encoder(views)
    assert rows.shape == (6, 16)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    for i, view in enumerate(views):
        torch.testing.assert_close(rows[3 * i : 3 * i + 3], encoder([view]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [resnet, vit])
def test_views_of_several_sizes(make: Callable[[], Encoder]) -> None:
    rows = make()([torch.rand(2, 3, 32, 32), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)])
    assert rows.shape == (6, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))


def test_each_view_is_its_own_batch_to_batchnorm() -> None:
    views = [torch.rand(4, 3, 32, 32), 2 + torch.rand(4, 3, 32, 32)]
    encoder = resnet().train()
    torch.testing.assert_close(encoder(views), torch.cat([encoder([view]) for view in views]), rtol=1e-4, atol=1e-5)


def test_rows_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = resnet()([torch.rand(2, 3, 32, 32)])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_the_stem_of_a_resnet_for_small_images() -> None:
    x = torch.rand(2, 3, 32, 32)
    sides = {small: resnet(small).backbone.forward_features(x).shape[-1] for small in (False, True)}
    assert sides == {False: 1, True: 4}
    stem = resnet().backbone.conv1
    assert (stem.kernel_size, stem.stride) == ((3, 3), (1, 1))
    assert isinstance(resnet().backbone.maxpool, nn.Identity)
    halved = Encoder("resnet18", small_images=True, stem_stride=2, backbone_args=RESNET)
    assert halved.backbone.forward_features(x).shape[-1] == 2


def test_the_stem_of_a_vit_for_small_images() -> None:
    x = torch.rand(2, 3, 32, 32)
    tokens = {small: vit(small).backbone.forward_features(x).shape[1] for small in (False, True)}
    assert tokens == {False: 1 + 2 * 2, True: 1 + 8 * 8}


@pytest.mark.parametrize(("hidden", "width"), [(None, 32), (48, 48)])
def test_the_head(hidden: int | None, width: int) -> None:
    head = Encoder("resnet18", dim=24, hidden=hidden, backbone_args=RESNET).head
    shapes = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert shapes == [(32, width), (width, 24)]


def test_head_and_predictor_with_batchnorm() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", dim=8, hidden=24, head_norm=True, predictor=12, backbone_args=RESNET)
    assert [type(layer) for layer in encoder.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert encoder.predictor is not None
    shapes = [(layer.in_features, layer.out_features) for layer in encoder.predictor if isinstance(layer, nn.Linear)]
    assert shapes == [(8, 12), (12, 8)]
    view = torch.rand(5, 3, 32, 32)
    expected = nn.functional.normalize(encoder.predictor(encoder.head(encoder.backbone(view))), dim=1)
    torch.testing.assert_close(encoder([view]), expected)


def kinds(layers: nn.Sequential) -> list[str]:
    """Return the types of the layers without ReLU, and whether they have a bias."""
    found = [layer for layer in layers if isinstance(layer, nn.Linear | nn.BatchNorm1d)]
    return [type(layer).__name__ + ("" if layer.bias is None else "+bias") for layer in found]


@pytest.mark.parametrize(
    ("settings", "head", "predictor"),
    [
        ({"head_layers": 1}, ["Linear+bias"], None),  # MoCo's CIFAR demonstration
        ({}, ["Linear+bias", "Linear+bias"], None),  # MoCo v2, AdCo
        (  # BYOL
            {"head_norm": True, "head_bias": False, "predictor": 6},
            ["Linear", "BatchNorm1d+bias", "Linear"],
            ["Linear", "BatchNorm1d+bias", "Linear"],
        ),
        (  # SimCLR, MoCo v3
            {"head_layers": 3, "head_norm": True, "head_final_norm": True, "predictor": 6},
            ["Linear", "BatchNorm1d+bias", "Linear", "BatchNorm1d+bias", "Linear", "BatchNorm1d"],
            ["Linear", "BatchNorm1d+bias", "Linear", "BatchNorm1d"],
        ),
    ],
)
def test_heads_of_the_papers(settings: dict[str, Any], head: list[str], predictor: list[str] | None) -> None:
    encoder = Encoder("resnet18", dim=8, hidden=24, backbone_args=RESNET, **settings)
    assert kinds(encoder.head) == head
    assert (kinds(encoder.predictor) if encoder.predictor else None) == predictor
    assert encoder([torch.rand(5, 3, 32, 32)]).shape == (5, 8)


def test_a_predictor_is_frozen_in_evaluation_and_learns_again_after_it() -> None:
    """Predictions of one image do not depend on the others, and looking changes no running statistics."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", dim=8, head_norm=True, predictor=12, backbone_args=RESNET).train()
    views = torch.rand(4, 3, 32, 32)
    encoder([views])
    before = {name: x.clone() for name, x in encoder.named_buffers()}
    with evaluation_mode(encoder), torch.no_grad():
        torch.testing.assert_close(encoder([views])[:1], encoder([views[:1]]))
    assert all(torch.equal(x, before[name]) for name, x in encoder.named_buffers())
    assert all(module.training for module in encoder.modules())


def test_a_backbone_that_widens_its_features_after_pooling() -> None:
    encoder = Encoder("mobilenetv3_small_050", dim=16).eval()
    assert encoder([torch.rand(2, 3, 64, 64)]).shape == (2, 16)


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"])
def test_vits_of_a_fixed_size(name: str) -> None:
    """timm's ViTs with relative positions do not take dynamic_img_size."""
    arguments = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    encoder = Encoder(name, dim=16, small_images=True, backbone_args=arguments)
    assert encoder([torch.rand(2, 3, 32, 32)]).shape == (2, 16)
    assert encoder.backbone.patch_embed.patch_size == (4, 4)
    with pytest.raises(ValueError, match=rf"{name} does not take .*'colour'"):
        Encoder(name, backbone_args={"colour": "red"})
    with pytest.raises(ValueError, match=rf"{name} does not take .*'dynamic_img_size'"):
        Encoder(name, backbone_args={"dynamic_img_size": True})


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"model\.backbone: timm has no model 'resnet19'"):
        Encoder("resnet19")


def test_argument_that_the_backbone_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"model\.backbone_args: resnet18 does not take \{'colour': 'red'\}"):
        Encoder("resnet18", backbone_args={"colour": "red"})


def test_no_stem_for_small_images() -> None:
    with pytest.raises(ValueError, match=r"model\.small_images: mobilenetv3_small_050 has no ResNet or ViT stem"):
        Encoder("mobilenetv3_small_050", small_images=True)
