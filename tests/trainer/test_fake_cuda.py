"""No step of any method makes the host wait for the GPU; see `tests.trainer.fake_cuda`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.fake_cuda import Plant, Sections, find_waits

BANK = {"size": 64, "temperature": 0.2}
PREDICTOR = {"predictor": 24, "head_norm": True}
TWO_VIEWS = [{"size": 16}] * 2
# Network and sections that differ from AdCo with shuffled BatchNorm, a sharded bank, SGD and bf16.
CASES: dict[str, tuple[str, Sections]] = {
    "adco": ("resnet", {"method": {"bn": "shuffle"}}),
    "adco, symmetric": ("resnet", {"model": PREDICTOR, "method": {"bn": "shuffle", "symmetric": True}}),
    "adco, own key": (
        "resnet",
        {"method": {"bn": "local", "batch_keys": False}, "bank": {**BANK, "placement": "node"}},
    ),
    "adco, bf16 bank": (
        "resnet",
        {
            "method": {"bn": "local", "bn_group": 2},
            "bank": {**BANK, "placement": "replicated", "weights": "bf16", "velocity": "none", "momentum": 0},
        },
    ),
    "adco, fp16": ("resnet", {"method": {"bn": "shuffle"}, "run": {"precision": "fp16"}}),
    "adco, micro-batches": ("vit", {"data": {"batch_size": 32}, "optim": {"name": "adamw", "accumulate": 2}}),
    "adco, lars": ("resnet", {"method": {"bn": "local"}, "optim": {"name": "lars", "decay_norm_and_bias": False}}),
    "moco": ("resnet", {"method": {"name": "moco", "bn": "shuffle", "symmetric": True}, "bank": BANK}),
    "caco": ("resnet", {"method": {"name": "caco", "bn": "shuffle"}, "bank": BANK}),
    "acssl, keys": ("resnet", {"model": PREDICTOR, "method": {"name": "acssl", "bn": "shuffle", "hardest": 4}}),
    "acssl, queue": (
        "resnet",
        {"model": PREDICTOR, "method": {"name": "acssl", "bn": "shuffle", "negatives_from": "queue"}, "bank": BANK},
    ),
    "acssl, bank": (
        "resnet",
        {"model": PREDICTOR, "method": {"name": "acssl", "bn": "shuffle", "negatives_from": "bank"}, "bank": BANK},
    ),
    "simclr": ("resnet", {"method": {"name": "simclr", "bn": "local"}, "data": {"views": TWO_VIEWS}}),
    "byol": ("resnet", {"model": PREDICTOR, "method": {"name": "byol", "bn": "local"}}),
}


def test_no_step_makes_the_host_wait() -> None:
    found = dict(zip(CASES, find_waits(list(CASES.values())), strict=True))
    assert found == dict.fromkeys(CASES)


def read(loss: Tensor) -> Any:
    return loss.item()


def branch(loss: Tensor) -> Any:
    return 1 if loss > 0 else 0


def select(loss: Tensor) -> Any:
    return loss[None][loss[None] > 0]


def assign(loss: Tensor) -> None:
    values = loss.repeat(3)
    values[values > 0] = values


def copy(loss: Tensor) -> Any:
    return loss.cpu()


def send(loss: Tensor) -> Any:
    return torch.ones(3).to(loss.device)


def mix(loss: Tensor) -> Any:
    return loss + torch.ones(3, device="cpu")


@pytest.mark.parametrize("plant", [read, branch, select, assign, copy, send, mix])
def test_what_makes_the_host_wait_is_found_with_file_and_line(plant: Plant) -> None:
    (found,) = find_waits([CASES["byol"]], plant)
    line = plant.__code__.co_firstlineno
    assert found is not None
    assert found.startswith(
        (f"tests/trainer/test_fake_cuda.py:{line + 1}: ", f"tests/trainer/test_fake_cuda.py:{line + 2}: ")
    )
