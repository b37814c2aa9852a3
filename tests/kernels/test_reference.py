"""The specification against the loss with materialised logits, differentiated by autograd, in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import AdversaryParams, reference
from tests.kernels.cases import ADVERSARY_TEMPERATURE, TEMPERATURE, Case, make_case


def mean_loss(q_ND: Tensor, k_ND: Tensor, n_KD: Tensor, temperature: float) -> Tensor:
    """The contrastive loss (AdCo, eq. 1): query i's own key is row i of k, all keys and negatives are classes."""
    logits_NC = torch.cat([q_ND @ k_ND.T, q_ND @ n_KD.T], dim=1) / temperature
    return F.cross_entropy(logits_NC, torch.arange(len(q_ND)))


def paired(queries: int = 6, negatives: int = 20, dim: int = 8) -> Case:
    """Make a case in which key i is query i's own."""
    return make_case(queries, queries, negatives, dim)._replace(own_N=torch.arange(queries))


def score(case: Case) -> reference.Score:
    return reference.score(case.q_ND, case.k_MD, case.own_N, case.n_KD, TEMPERATURE, ADVERSARY_TEMPERATURE)


def step(case: Case, lr: float, momentum: float, weight_decay: float) -> tuple[Case, reference.AdversaryStats]:
    """Return a copy of the case after one step of the adversary on the mean loss."""
    after = case._replace(n_KD=case.n_KD.clone(), w_KD=case.w_KD.clone(), v_KD=case.v_KD.clone())
    stats = reference.adversary_step(
        after.q_ND,
        1 / (score(case).za_N * len(case.q_ND)),
        after.n_KD,
        after.w_KD,
        after.v_KD,
        AdversaryParams(ADVERSARY_TEMPERATURE, lr, momentum, weight_decay),
    )
    return after, stats


def test_loss_and_gradient_by_the_queries() -> None:
    case = paired()
    got = score(case)
    q_ND = case.q_ND.clone().requires_grad_()
    loss = mean_loss(q_ND, case.k_MD, case.n_KD, TEMPERATURE)
    (grad_ND,) = torch.autograd.grad(loss, q_ND)
    l_N = got.z_N.log() - (case.q_ND * case.k_MD).sum(1) / TEMPERATURE
    dq_ND = (got.o_ND / got.z_N[:, None] - case.k_MD) / TEMPERATURE
    torch.testing.assert_close(l_N.mean(), loss.detach())
    torch.testing.assert_close(dq_ND / len(q_ND), grad_ND)


def test_gradient_formula_passes_gradcheck() -> None:
    case = paired(3, 5, 4)

    class Losses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q_ND: Tensor) -> Tensor:
            got = score(case._replace(q_ND=q_ND))
            ctx.save_for_backward((got.o_ND / got.z_N[:, None] - case.k_MD) / TEMPERATURE)
            return got.z_N.log() - (q_ND * case.k_MD).sum(1) / TEMPERATURE

        @staticmethod
        def backward(ctx: Any, grad_N: Tensor) -> Tensor:
            (dq_ND,) = ctx.saved_tensors
            return grad_N[:, None] * dq_ND

    assert torch.autograd.gradcheck(Losses.apply, case.q_ND.clone().requires_grad_())


def test_adversary_sum_and_top_rival() -> None:
    case = make_case(7, 5, 11, 8)
    assert case.own_N is not None
    got = score(case)
    for i, own in enumerate(case.own_N.tolist()):
        similarities = [float(case.q_ND[i] @ column) for column in torch.cat([case.k_MD, case.n_KD])]
        za = sum(torch.tensor(s / ADVERSARY_TEMPERATURE, dtype=torch.float64).exp() for s in similarities)
        torch.testing.assert_close(got.za_N[i], za)
        rivals = [s for column, s in enumerate(similarities) if column != own]
        assert got.top_N[i].item() == pytest.approx(max(rivals), rel=1e-12)


def test_sums_over_parts_add_up() -> None:
    case = make_case(5, 4, 9, 8, own="none")
    whole = score(case)
    none = case.k_MD[:0]
    parts = [
        score(case._replace(n_KD=case.n_KD[:3])),
        score(case._replace(k_MD=none, n_KD=case.n_KD[3:])),
    ]
    torch.testing.assert_close(parts[0].z_N + parts[1].z_N, whole.z_N)
    torch.testing.assert_close(parts[0].o_ND + parts[1].o_ND, whole.o_ND)
    torch.testing.assert_close(parts[0].za_N + parts[1].za_N, whole.za_N)
    torch.testing.assert_close(torch.maximum(parts[0].top_N, parts[1].top_N), whole.top_N)


def test_no_columns() -> None:
    case = make_case(3, 1, 4, 8)
    got = score(case._replace(own_N=torch.zeros(3, dtype=torch.int64), n_KD=case.n_KD[:0]))
    assert torch.equal(got.top_N, torch.full((3,), float("-inf"), dtype=torch.float64))


def test_step_is_the_gradient_by_the_weights() -> None:
    case = paired()
    w_KD = case.w_KD.clone().requires_grad_()
    loss = mean_loss(case.q_ND, case.k_MD, F.normalize(w_KD, dim=1), ADVERSARY_TEMPERATURE)
    (grad_KD,) = torch.autograd.grad(loss, w_KD)
    after, stats = step(case, lr=3.0, momentum=0.9, weight_decay=1e-2)
    v_KD = 0.9 * case.v_KD - grad_KD + 1e-2 * case.w_KD
    torch.testing.assert_close(after.v_KD, v_KD)
    torch.testing.assert_close(after.w_KD, case.w_KD - 3.0 * v_KD)
    torch.testing.assert_close(after.n_KD, F.normalize(after.w_KD, dim=1))
    torch.testing.assert_close(stats.grad_K, grad_KD.norm(dim=1))


def test_mass_is_each_negatives_share_of_the_softmax() -> None:
    case = paired()
    logits_NC = torch.cat([case.q_ND @ case.k_MD.T, case.q_ND @ case.n_KD.T], dim=1) / ADVERSARY_TEMPERATURE
    _, stats = step(case, lr=0.0, momentum=0.0, weight_decay=0.0)
    torch.testing.assert_close(stats.mass_K, logits_NC.softmax(1)[:, len(case.q_ND) :].mean(0))


def test_step_ascends() -> None:
    case = paired()
    before = mean_loss(case.q_ND, case.k_MD, case.n_KD, ADVERSARY_TEMPERATURE)
    after, stats = step(case, lr=1e-4, momentum=0.0, weight_decay=0.0)
    gain = mean_loss(case.q_ND, case.k_MD, after.n_KD, ADVERSARY_TEMPERATURE) - before
    # To first order the loss rises by lr |gradient|^2.
    torch.testing.assert_close(gain, 1e-4 * stats.grad_K.square().sum(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_widened(dtype: torch.dtype) -> None:
    case = paired().to(dtype)
    got = score(case)
    assert {field.dtype for field in got} == {torch.float32}
    expected = score(case.to(torch.float64))
    for field, value in zip(got, expected, strict=True):
        torch.testing.assert_close(field.double(), value, rtol=1e-4, atol=1e-4)
