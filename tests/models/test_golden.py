"""Loss, both gradients and both updates against an independent implementation of AdCo.

tests/golden/adco_reference.safetensors has fixed random embeddings and the results of three steps (fp32, CPU) for
{asym|sym|multicrop}.world{1|2}; its metadata has the settings. The views' losses in it are not halved for the symmetric
variant.
"""

import os
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from models.adco import AdCo, Settings
from models.encoder import Encoder
from models.negatives.bank import Bank
from models.negatives.base import BankSettings, Placement, make_mesh
from tests.kernels.cases import use_kernels
from tests.ranks import run_ranks

GOLDEN = Path(__file__).parent.parent / "golden" / "adco_reference.safetensors"
LR, STEPS = 3.0, 3
TRITON = os.environ.get("TRITON_INTERPRET") == "1"  # see test_triton.py
KERNELS = ["triton"] if TRITON else ["reference", "chunked"]
# A kernel sees a rank's whole bank or its shard, whatever the placement is called.
PLACEMENTS = [(1, "sharded"), (2, "sharded"), *([] if TRITON else [(2, "replicated")])]

# Indices of the views of the golden file's queries and keys.
VARIANTS = {
    "asym": ({1: "query0"}, {0: "key0"}),
    "sym": ({1: "query0", 0: "query1"}, {0: "key0", 1: "key1"}),
    "multicrop": ({1: "query0", 2: "query1", 3: "query2"}, {0: "key0"}),
}


def three_steps(
    kernels: str, variant: str, placement: Placement
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return this rank's results and the golden ones for each step."""
    use_kernels(kernels)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = f"{variant}.world{world_size}"
    with safe_open(GOLDEN, "pt") as file:
        golden = {name.removeprefix(case + "."): file.get_tensor(name) for name in file.keys() if name.startswith(case)}  # noqa: SIM118
    size, dim = golden["W"].shape
    mesh = make_mesh(placement, torch.device("cpu"), ranks_per_node=world_size)
    bank = Bank(BankSettings(size=size, temperature=0.02, momentum=0.9, weight_decay=1e-4), dim, mesh)
    shard = slice(bank.first, bank.first + len(bank.w_KD))
    bank.fill(golden["W"][shard])
    assert bank.v_KD is not None
    bank.v_KD.copy_(golden["v"][shard])
    network = cast(Encoder, nn.Identity())  # the file has embeddings, not images
    adco = AdCo(network, Settings(temperature=0.12, symmetric=variant == "sym"), bank)

    got, expected = [], []
    query_views, key_views = VARIANTS[variant]
    for step in range(STEPS):
        here = {
            k.removeprefix(f"rank{rank}.step{step}."): v for k, v in golden.items() if f"rank{rank}.step{step}." in k
        }
        queries = {view: here[name].clone().requires_grad_() for view, name in query_views.items()}
        output = adco.loss(queries, {view: here[name] for view, name in key_views.items()})
        output.loss.backward()
        bank.update([output.negatives_update], LR, seed=step)
        losses = torch.stack([here[f"loss{i}"].squeeze() for i in range(len(queries))])
        gradients = [q.grad for q in queries.values() if q.grad is not None]
        got.append(
            {"loss": output.loss.detach(), "dq": torch.stack(gradients), "w": bank.w_KD.clone(), "v": bank.v_KD.clone()}
        )
        expected.append(
            {
                "loss": losses.sum() / len(key_views),
                "dq": torch.stack([here[f"grad{i}"] for i in range(len(queries))]),
                "w": golden[f"step{step}.W_after"][shard],
                "v": golden[f"step{step}.v_after"][shard],
            }
        )
    return got, expected


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world_size", "placement"), PLACEMENTS)
def test_agrees_with_the_golden_values(world_size: int, placement: str, variant: str, kernels: str) -> None:
    for got, expected in run_ranks(world_size, three_steps, kernels, variant, placement):
        for step in range(STEPS):
            for name in ("loss", "dq", "w", "v"):
                torch.testing.assert_close(
                    got[step][name], expected[step][name], rtol=1e-5, atol=1e-5, msg=f"{name} {step}"
                )
