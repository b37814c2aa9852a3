"""Encoders and the loss of every method trace as one graph, with its collectives, and compute the same."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from models.encoder import Encoder
from models.method import Method, StepOutput, Views
from models.teacher import MovingAverage, make_teacher
from tests.ranks import run_ranks
from tests.trainer.engines import make_config, make_rank_info
from tests.trainer.small import VIT_ARGS
from trainer.build import build_method

B, D = 4, 16
PAIR = [{"size": 16}] * 2
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adco": {},
    "adco, own keys, replicated": {
        "method": {"batch_keys": False, "symmetric": True},
        "bank": {"placement": "replicated"},
    },
    "moco": {"method": {"name": "moco"}, "bank": {"size": 64}},
    "acssl": {"method": {"name": "acssl", "hardest": 3}},
    "acssl, bank": {"method": {"name": "acssl", "hardest": 3, "negatives_from": "bank"}},
    "simclr": {"method": {"name": "simclr"}, "data": {"views": PAIR}},
    "byol": {"method": {"name": "byol"}, "model": {"predictor": 8}},
    "caco": {"method": {"name": "caco"}},
}


def build(case: str) -> Method:
    config = make_config("vit", **{**CASES[case], "method": {"bn": "local", **CASES[case].get("method", {})}})
    method = build_method(config, make_rank_info())
    if method.negatives:
        rows = normalize(torch.randn(method.negatives.size, D, generator=torch.Generator().manual_seed(3)), dim=1)
        first = method.negatives.first
        method.negatives.n_KD.copy_(rows[first : first + len(method.negatives.n_KD)])
    return method


def loss_and_gradients(method: Method, case: str, loss: Any) -> tuple[StepOutput, list[Tensor]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    views = len(CASES[case].get("data", {"views": range(3)})["views"])

    def rows() -> Tensor:
        return normalize(torch.randn(B, D, generator=generator), dim=1)

    queries: Views = {i: rows().requires_grad_() for i in method.query_views(views)}
    keys: Views = {j: rows() for j in method.key_views}
    output: StepOutput = loss(queries, keys)
    output.loss.backward()
    return output, [q.grad for q in queries.values() if q.grad is not None]


def compare(backend: str, cases: list[str]) -> None:
    for case in cases:
        method = build(case)
        torch._dynamo.reset()
        compiled = torch.compile(method.loss, backend=backend, fullgraph=True, dynamic=False)
        expected, gradients = loss_and_gradients(method, case, method.loss)
        output, found = loss_and_gradients(method, case, compiled)
        torch.testing.assert_close(found, gradients)
        assert len(gradients) >= 2, case
        torch.testing.assert_close(output.metrics, expected.metrics)
        torch.testing.assert_close(list(output.negatives_update), list(expected.negatives_update))


@pytest.mark.slow
def test_the_loss_traces_as_one_graph_on_two_ranks() -> None:
    run_ranks(2, compare, "aot_eager", list(CASES))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_traces_as_one_graph_in_one_process(case: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compare("eager", [case])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [
        ("resnet18", torch.bfloat16),
        pytest.param("vit_tiny_patch16_224", torch.float32, marks=pytest.mark.slow),
        pytest.param("resnet18", torch.float32, marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_traces_as_one_graph_over_crops_of_several_sizes(backbone: str, dtype: torch.dtype) -> None:
    """Also a teacher that keeps its weights in the type of autocast."""
    narrow: dict[str, Any] = {"channels": (8, 8, 8, 16), "layers": (1, 1, 1, 1)}
    arguments = narrow if backbone == "resnet18" else VIT_ARGS
    student = Encoder(backbone, dim=8, head_norm=True, backbone_args=arguments)
    teacher = make_teacher(student)
    MovingAverage(teacher, student, precision=dtype)
    views = [torch.rand(3, 3, size, size) for size in (16, 16, 8)]
    for network in (student, teacher):
        torch._dynamo.reset()
        compiled = torch.compile(network.forward, backend="eager", fullgraph=True, dynamic=False)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            torch.testing.assert_close(compiled(views), network(views))
