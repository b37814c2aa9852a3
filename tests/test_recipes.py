"""The recipes in configs/ have the augmentations, heads and settings of their papers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from data.views import ViewParams, draw
from trainer.build import build_encoder
from trainer.config import Config, check_world
from trainer.config_file import load

CONFIGS = Path(__file__).parents[1] / "configs"
N = 20_000
SIGMAS = 4  # statistical tests allow this many standard errors

# Of each view: probabilities of jitter, gray, blur and solarize; strengths of brightness, contrast, saturation and hue.
MOCO_V2 = [0.8, 0.2, 0.5, 0.0, 0.4, 0.4, 0.4, 0.1]  # main_moco.py, --aug-plus; AdCo's main_worker.py
BYOL = [[0.8, 0.2, 1.0, 0.0, 0.4, 0.4, 0.2, 0.1], [0.8, 0.2, 0.1, 0.2, 0.4, 0.4, 0.2, 0.1]]  # BYOL, table 6
SIMCLR = [0.8, 0.2, 0.5, 0.0, 0.8, 0.8, 0.8, 0.2]  # SimCLR, app. A
CIFAR = [0.8, 0.2, 0.0, 0.0, 0.4, 0.4, 0.4, 0.1]  # moco_cifar10_demo.ipynb


def recipe(name: str) -> Config:
    return load(CONFIGS / f"{name}.yaml")


def drawn(config: Config) -> list[ViewParams]:
    """The parameters of each view of many images, as training draws them."""
    data = config.data
    samples = np.arange(N)
    return [draw(0, 0, samples, v, view, view.own_augment(data.augment)) for v, view in enumerate(data.views)]


@pytest.mark.parametrize(
    ("name", "smallest", "views"),
    [
        ("adco_r50_200ep", 0.2, [MOCO_V2, MOCO_V2]),
        ("moco_r50_200ep", 0.2, [MOCO_V2, MOCO_V2]),
        ("simclr_r50_200ep", 0.08, [SIMCLR, SIMCLR]),
        ("byol_r50_200ep", 0.08, BYOL),
        ("caco_r50_200ep", 0.2, BYOL),
        ("adco_vit_s16", 0.08, BYOL),
        ("moco_cifar10", 0.08, [CIFAR, CIFAR]),
    ],
)
def test_augmentations_of_each_view(name: str, smallest: float, views: list[list[float]]) -> None:
    for p, published in zip(drawn(recipe(name)), views, strict=True):
        shares = [float(applied.mean()) for applied in (p.hue != 0, p.gray, p.sigma > 0, p.solarize)]
        for share, probability in zip(shares, published[:4], strict=True):
            assert abs(share - probability) <= SIGMAS * np.sqrt(probability * (1 - probability) / N)
        assert abs(p.flip.mean() - 0.5) < SIGMAS * 0.5 / np.sqrt(N)
        factors = [p.brightness, p.contrast, p.saturation, 1 + p.hue / (2 * np.pi)]
        for factor, strength in zip(factors, published[4:], strict=True):
            assert factor.min() == pytest.approx(1 - strength, abs=0.002)
            assert factor.max() == pytest.approx(1 + strength, abs=0.002)
        if published[2]:
            assert p.sigma[p.sigma > 0].min() == pytest.approx(0.1, abs=0.01)
            assert p.sigma.max() == pytest.approx(2.0, abs=0.01)
        area = p.crop_height * p.crop_width
        assert area.min() == pytest.approx(smallest, abs=0.001)
        assert area.max() == pytest.approx(1, abs=0.001)


def linear_layers(module: nn.Module) -> list[tuple[int, int, bool]]:
    """Return inputs, outputs and bias of each linear layer."""
    found = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [(layer.in_features, layer.out_features, layer.bias is not None) for layer in found]


@pytest.mark.parametrize(
    ("name", "zero_init", "head", "predictor", "final_norm"),
    [
        ("adco_r50_200ep", False, [(2048, 2048, True), (2048, 128, True)], [], False),
        ("moco_r50_200ep", False, [(2048, 2048, True), (2048, 128, True)], [], False),
        ("simclr_r50_200ep", True, [(2048, 2048, False), (2048, 2048, False), (2048, 128, False)], [], True),
        (
            "byol_r50_200ep",
            True,
            [(2048, 4096, False), (4096, 256, False)],
            [(256, 4096, False), (4096, 256, False)],
            False,
        ),
        ("caco_r50_200ep", False, [(2048, 2048, False), (2048, 2048, False), (2048, 256, False)], [], False),
        ("moco_cifar10", False, [(512, 128, True)], [], False),
    ],
)
def test_initialisation_and_heads(name: str, zero_init: bool, head: Any, predictor: Any, final_norm: bool) -> None:
    encoder = build_encoder(recipe(name))
    block = encoder.backbone.layer1[0]
    last = block.bn3 if hasattr(block, "bn3") else block.bn2
    assert bool((last.weight == 0).all()) == zero_init
    assert linear_layers(encoder.head) == head
    assert (linear_layers(encoder.predictor) if encoder.predictor else []) == predictor
    assert isinstance(encoder.head[-1], nn.BatchNorm1d) == final_norm


def test_the_vision_transformer_has_moco_v3s_heads() -> None:
    config = recipe("adco_vit_s16")
    encoder = build_encoder(config)
    assert linear_layers(encoder.head) == [(384, 4096, False), (4096, 4096, False), (4096, 256, False)]
    assert encoder.predictor is not None
    assert linear_layers(encoder.predictor) == [(256, 4096, False), (4096, 256, False)]
    assert all(isinstance(layers[-1], nn.BatchNorm1d) for layers in (encoder.head, encoder.predictor))


@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
@pytest.mark.parametrize("name", ["adco_r50_200ep", "adco_r50_200ep_multicrop", "moco_r50_200ep", "moco_cifar10"])
def test_batchnorm_has_the_published_number_of_images(name: str, ranks: int) -> None:
    config = recipe(name)
    check_world(config, ranks, min(ranks, 8))
    assert config.data.batch_size // 8 == config.method.bn_group
