"""The spread of features without labels: known values, and a run that learns against one that does not."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from data.sources.open import open_source
from models.health import effective_rank
from tests.trainer.small import small_config, write_images
from trainer.build import build_encoder
from trainer.evaluate.spread import alignment, measure_spread, uniformity


def test_known_values() -> None:
    x_ND = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
    assert alignment(x_ND, 2 * x_ND) == pytest.approx(0, abs=1e-6)  # of unit length
    assert alignment(x_ND, -x_ND) == pytest.approx(4)
    assert uniformity(torch.eye(2)) == pytest.approx(-4)  # d² = 2
    assert uniformity(torch.tensor([[1.0, 0], [0, 1], [-1, 0]])) == pytest.approx(
        math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    )
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-9)
    assert -4 < uniformity(x_ND) < -3.6


def test_a_collapsed_backbone_shows_in_all_three(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", write_images(tmp_path / "images"))
    validation = open_source(config.data.train)
    device, encoder = torch.device("cpu"), build_encoder(config)
    row = measure_spread(encoder, validation, device, config)
    assert row == measure_spread(encoder, validation, device, config)  # the same images and views
    assert 1.5 < row["rankme"] <= 16
    assert row["alignment"] > 1e-4
    assert row["uniformity"] < -1e-4

    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 16) + 0 * x.mean()

    encoder.backbone = Constant()
    row = measure_spread(encoder, validation, device, config)
    assert row["rankme"] == pytest.approx(1)
    assert (row["alignment"], row["uniformity"]) == pytest.approx((0, 0), abs=1e-9)
