"""No step of any method makes the host wait for the GPU; see `tests.trainer.fake_cuda`."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.fake_cuda import Case, find_waits

BANK = {"size": 64, "temperature": 0.2}
PREDICTOR = {"predictor": 24, "head_norm": True}
TWO_VIEWS = {"data": {"views": [{"size": 16}] * 2}}  # instead of three
# CaCo, SimCLR and BYOL normalise over the global batch.
CASES: dict[str, Case] = {
    "adco": Case("resnet", {"method": {"bn": "shuffle"}}),
    "adco, symmetric": Case("resnet", {"model": PREDICTOR, "method": {"bn": "shuffle", "symmetric": True}}),
    "adco, own key": Case(
        "resnet",
        {**TWO_VIEWS, "method": {"bn": "local", "batch_keys": False}, "bank": {**BANK, "placement": "node"}},
    ),
    "adco, bf16 bank": Case(
        "resnet",
        {
            **TWO_VIEWS,
            "method": {"bn": "local", "bn_group": 2},
            "bank": {**BANK, "placement": "replicated", "weights": "bf16", "velocity": "none", "momentum": 0},
        },
    ),
    "adco, fp16": Case("resnet", {**TWO_VIEWS, "method": {"bn": "shuffle"}, "run": {"precision": "fp16"}}),
    "adco, micro-batches": Case("vit", {"data": {"batch_size": 32}, "optim": {"name": "adamw", "accumulate": 2}}),
    "adco, lars": Case(
        "resnet", {**TWO_VIEWS, "method": {"bn": "local"}, "optim": {"name": "lars", "decay_norm_and_bias": False}}
    ),
    "moco": Case("resnet", {**TWO_VIEWS, "method": {"name": "moco", "bn": "shuffle", "symmetric": True}, "bank": BANK}),
    "caco": Case("resnet", {"method": {"name": "caco"}, "bank": BANK}),
    "acssl, keys": Case("resnet", {"model": PREDICTOR, "method": {"name": "acssl", "bn": "shuffle", "hardest": 4}}),
    "acssl, queue": Case(
        "resnet",
        {
            **TWO_VIEWS,
            "model": PREDICTOR,
            "method": {"name": "acssl", "bn": "shuffle", "negatives_from": "queue"},
            "bank": BANK,
        },
    ),
    "acssl, bank": Case(
        "resnet",
        {
            **TWO_VIEWS,
            "model": PREDICTOR,
            "method": {"name": "acssl", "bn": "shuffle", "negatives_from": "bank"},
            "bank": BANK,
        },
    ),
    "simclr": Case("resnet", {"method": {"name": "simclr"}, **TWO_VIEWS}),
    "byol": Case("resnet", {"model": PREDICTOR, "method": {"name": "byol"}}),
}


FAST = ("adco, micro-batches", "moco", "acssl, bank")  # both networks, two optimizers, shuffle, bank and queue


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([name for name in CASES if name not in FAST], marks=pytest.mark.slow)],
    ids=["some", "the others"],
)
def test_no_step_makes_the_host_wait(names: Sequence[str]) -> None:
    found = dict(zip(names, find_waits([CASES[name] for name in names]), strict=True))
    assert found == dict.fromkeys(names)


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


def test_what_makes_the_host_wait_is_found_with_file_and_line() -> None:
    plants = [read, branch, select, assign, copy, send, mix]
    byol: dict[str, dict[str, Any]] = {
        "model": {"predictor": 24},
        "method": {"name": "byol", "bn": "local"},
        **TWO_VIEWS,
    }
    for plant, found in zip(plants, find_waits([Case("vit", byol, x) for x in plants]), strict=True):
        first = plant.__code__.co_firstlineno
        assert found is not None, plant
        assert re.match(rf"tests/trainer/test_fake_cuda.py:({first + 1}|{first + 2}): ", found), found
