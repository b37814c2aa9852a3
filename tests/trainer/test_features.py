"""Evaluations give the networks images of autocast's type, which does not change any feature."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from data.loader import eval_batches
from tests.trainer.evaluations import evaluate_here, write_run
from tests.trainer.small import small_config, write_images
from trainer.build import build_encoder
from trainer.evaluate.features import evaluation_mode, forward_images
from trainer.evaluate.linear import EVALUATOR
from trainer.run.sources import open_sources

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.usefixtures("small_group")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_features_are_those_of_images_in_fp32(tmp_path: Path, precision: str) -> None:
    images = write_images(tmp_path / "images", each=4)
    config = small_config(tmp_path / "run", images, run={"precision": precision})
    source, samples = open_sources(config.data, tmp_path)[0], np.arange(12)
    backbone = build_encoder(config).backbone.eval()
    (batch,) = eval_batches(source, samples, 16, 12, 0)
    (normalized,) = batch.normalized(CPU)
    seen: list[torch.dtype] = []

    def record(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x if isinstance(network, nn.Flatten) else backbone(x)

    for network in (backbone, nn.Flatten()):
        ((features, _),) = forward_images(network, record, source, samples, CPU, config)
        with torch.autocast("cpu", enabled=precision == "bf16"):
            assert torch.equal(features, network(normalized).float() if network is backbone else normalized)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32, torch.float32]


@pytest.mark.usefixtures("small_group")
def test_a_linear_classifier_sees_images_of_autocast_type(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_images(tmp_path / "images"))
    seen: set[tuple[bool, torch.dtype]] = set()

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen.add((module.training, inputs[0].dtype))

    hook = register_module_forward_pre_hook(record)
    settings = ["linear.epochs=1", "linear.batch_size=36", "linear.lr=1", "run.precision=bf16"]
    try:
        evaluate_here(EVALUATOR, run, settings)
    finally:
        hook.remove()
    assert seen == {(False, torch.bfloat16)}


def test_parts_in_evaluation_mode_stay_in_it() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network] == [True, False]
    assert network.training
