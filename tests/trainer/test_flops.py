"""FLOPs of a step against published numbers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.config import Config
from trainer.config_file import load
from trainer.plan.flops import step_flops
from trainer.plan.hardware import GPUS, known_gpu, peak_flops

ROOT = Path(__file__).parents[2]


def recipe(name: str, *overrides: str) -> Config:
    return load(ROOT / f"configs/{name}.yaml", ["data.train=none", "bank.size=1000", *overrides])


@pytest.mark.parametrize(
    ("backbone", "gmac"),  # at 224 pixels with a classifier, from timm's results/model_metadata-in1k.csv
    [("resnet50", 4.11), ("vit_small_patch16_224", 4.61), ("vit_base_patch16_224", 17.58)],
)
def test_networks(backbone: str, gmac: float) -> None:
    config = recipe("adco_r50_200ep", f"model.backbone={backbone}", "model.backbone_args={}", "data.batch_size=64")
    images, rows = 64, 64
    # One query with forward and backward, and one key; a multiply-add is 2 FLOPs.
    assert step_flops(config) == pytest.approx(images * 4 * 2e9 * gmac + 6 * rows * 1000 * 128, rel=0.03)


def test_symmetric_loss_and_crops() -> None:
    single, symmetric = (step_flops(recipe("adco_r50_200ep", f"method.symmetric={s}")) for s in ("false", "true"))
    assert symmetric == pytest.approx(2 * single)
    views = "data.views=[{size: 224}, {size: 224}, {size: 112}]"
    crops = step_flops(recipe("adco_r50_200ep", views))
    assert crops / single == pytest.approx((4 + 3 / 4) / 4, rel=0.02)  # a quarter of the pixels, forward and backward


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "Tesla V100-SXM2-32GB": 125e12,
        "NVIDIA A40": 150e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": None,
        "NVIDIA RTX A3000 Laptop GPU": None,
        "NVIDIA RTX A4000": None,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
        "Other": None,
    }
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == flops, name


def test_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_gpu(torch.device("cpu")) is None
    names = {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "Tesla V100-SXM2-32GB": "v100",
        "NVIDIA A100-PCIE-40GB": None,
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA H200 NVL": None,
        "NVIDIA GH200 480GB": None,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
        "NVIDIA L4": None,
    }
    for name, key in names.items():
        memory = 40 if "40GB" in name else 80
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, m=memory: SimpleNamespace(total_memory=m * 1e9)
        )
        assert known_gpu(torch.device("cuda")) is (key and GPUS[key]), name
