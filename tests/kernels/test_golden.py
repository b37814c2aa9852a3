"""The kernels alone against the first step of an independent implementation of AdCo.

The queries and keys of all ranks are one batch here; `tests/models/test_golden.py` runs several ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kernels import AdversaryParams, chunked, reference

GOLDEN = Path(__file__).parent.parent / "golden" / "adco_reference.safetensors"
# For each variant the weight of each view's loss, and the key that each view's query is compared with.
VARIANTS = {"asym": (1.0, [0]), "sym": (0.5, [0, 1]), "multicrop": (1.0, [0, 0, 0])}


@pytest.mark.parametrize("kernels", [reference, chunked])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_step(kernels: Any, variant: str, world_size: int) -> None:
    check_first_step(kernels, variant, world_size)


def check_first_step(kernels: Any, variant: str, world_size: int) -> None:
    with safe_open(GOLDEN, "pt") as file:
        settings = {name: float(value) for name, value in file.metadata().items()}

        def load(name: str) -> Tensor:
            return file.get_tensor(f"{variant}.world{world_size}.{name}")

        def load_ranks(name: str) -> Tensor:
            return torch.cat([load(f"rank{rank}.step0.{name}") for rank in range(world_size)])

        view_weight, keys = VARIANTS[variant]
        tau, tau_a = settings["temperature"], settings["adversary_temperature"]
        w_KD, v_KD = load("W"), load("v")
        n_KD = w_KD / w_KD.norm(dim=1, keepdim=True)
        all_q, all_coef = [], []
        for view, key in enumerate(keys):
            q_ND, k_ND = load_ranks(f"query{view}"), load_ranks(f"key{key}")
            score = kernels.score(q_ND, k_ND, torch.arange(len(q_ND)), n_KD, tau, tau_a)
            loss_N = score.z_N.log() - (q_ND * k_ND).sum(1) / tau
            per_rank = len(q_ND) // world_size
            torch.testing.assert_close(
                loss_N.view(world_size, -1).mean(1), load_ranks(f"loss{view}"), rtol=1e-5, atol=1e-5
            )
            dq_ND = view_weight / per_rank * (score.o_ND / score.z_N[:, None] - k_ND) / tau
            torch.testing.assert_close(dq_ND, load_ranks(f"grad{view}"), rtol=1e-5, atol=1e-5)
            all_q.append(q_ND)
            all_coef.append(view_weight / (score.za_N * len(q_ND)))
        kernels.adversary_step(
            torch.cat(all_q),
            torch.cat(all_coef),
            n_KD,
            w_KD,
            v_KD,
            AdversaryParams(
                tau_a, settings["adversary_lr"], settings["adversary_momentum"], settings["adversary_weight_decay"]
            ),
        )
        torch.testing.assert_close(v_KD, load("step0.v_after"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(w_KD, load("step0.W_after"), rtol=1e-5, atol=1e-5)
