"""Time and peak memory of one step of the negatives on this CPU: the chunked kernels against the published formulation.

A step is what the negatives add to a training step: the contrastive loss of N queries against their keys and K
negatives, its accuracy, its gradient with respect to the queries, and the update of the bank. The published formulation
(github.com/maple-research-lab/AdCo) differentiates through logits of size N x (N + K). The published step also computes
a top-5 accuracy and a third softmax for a metric; both are left out here, in its favour.

Shapes: N queries and as many keys, K negatives, D dimensions, C = N + K columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import AdversaryParams, AdversaryStats, Score, chunked
from trainer.bench.harness import cpu_peak_bytes, environment, interleave, medians, print_rows, seconds, write_result

TEMPERATURE = 0.12
WEIGHTS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", None))  # types of weights and velocity
PARAMS = AdversaryParams(temperature=0.02, lr=3.0, momentum=0.9, weight_decay=1e-4)  # those of the published code

_CPU = torch.device("cpu")
# Largest difference of the two implementations, as a share of the largest value.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class NegativesCase:
    """The inputs and the state of a step: queries, keys, and the bank's weights, velocity (or None) and unit rows."""

    q_ND: Tensor
    k_ND: Tensor
    w_KD: Tensor
    v_KD: Tensor | None
    n_KD: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "NegativesCase":
        """Return a case with the function applied to all tensors."""
        v_KD = None if self.v_KD is None else function(self.v_KD)
        return NegativesCase(function(self.q_ND), function(self.k_ND), function(self.w_KD), v_KD, function(self.n_KD))

    def transposed(self) -> "NegativesCase":
        """Return a case with a copy of the bank as [D, K], the layout of the published code."""
        bank = self.map(lambda x: x.T.contiguous())
        return replace(bank, q_ND=self.q_ND, k_ND=self.k_ND)

    def with_dtype(self, dtype: torch.dtype) -> "NegativesCase":
        """Return a case with queries, keys and unit rows of this type; weights and velocity keep theirs."""
        return replace(self, q_ND=self.q_ND.to(dtype), k_ND=self.k_ND.to(dtype), n_KD=self.n_KD.to(dtype))


class StepResult(NamedTuple):
    """The loss [], the share [] of queries that are most similar to their own key, the gradient of the queries."""

    loss: Tensor
    accuracy: Tensor
    grad_ND: Tensor


Step = Callable[[NegativesCase], StepResult]  # updates the bank of the case in place


def run(rows: int, negatives: int, dim: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Compare the implementations on random unit vectors.

    Args:
        rows: Number of queries N.
        negatives: Number of negatives K.
        dim: Dimensions D.
        dtype: float32 or float64.
        repeats: Number of timed steps of each implementation.

    Returns:
        One dictionary for each implementation; `speedup` is over `materialised`, `peak_bytes` beyond the inputs.

    Raises:
        ValueError: The dtype is another one.
        RuntimeError: The implementations disagree.
    """
    torch_dtype = getattr(torch, dtype, None)
    if torch_dtype not in _TOLERANCES:
        raise ValueError(f"bench kernels: got dtype {dtype!r}, need float32 or float64")
    case = random_case(rows, negatives, dim, torch_dtype)
    sides: dict[str, tuple[Step, NegativesCase]] = {
        "materialised": (materialised_step, case.transposed()),
        "chunked": (partial(kernel_step, implementation=chunked), case),
    }
    _check_agreement(case, _TOLERANCES[torch_dtype])

    def turn(step: Step, start: NegativesCase) -> float:
        case = start.map(Tensor.clone)  # each turn starts from the same bank
        return seconds(lambda: step(case), _CPU)

    times = medians(interleave({name: partial(turn, *side) for name, side in sides.items()}, repeats))
    return [
        {
            "impl": name,
            "N": rows,
            "K": negatives,
            "D": dim,
            "dtype": dtype,
            "seconds_median": times[name],
            "peak_bytes": cpu_peak_bytes(partial(step, start.map(Tensor.clone))),
            "speedup": times["materialised"] / times[name],
        }
        for name, (step, start) in sides.items()
    ]


def materialised_peak(rows: int, negatives: int, dim: int) -> int:
    """Return the bytes that a step of the published formulation in fp32 allocates at a time beyond its inputs."""
    case = random_case(rows, negatives, dim, torch.float32).transposed()
    return cpu_peak_bytes(lambda: materialised_step(case))


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the rows of `run` as a table and write them to `out` as JSON."""
    largest = max(row["peak_bytes"] for row in rows)
    print_rows(
        "N = {N}, K = {K}, D = {D}, {dtype}".format(**rows[0]),
        {
            "implementation": lambda row: row["impl"],
            "seconds": lambda row: f"{row['seconds_median']:.4f}",
            "peak memory": lambda row: f"{row['peak_bytes'] / 2**20:.1f} MiB",
            "speed-up": lambda row: f"{row['speedup']:.2f}x",
            "less memory": lambda row: f"{largest / row['peak_bytes']:.1f}x",
        },
        rows,
    )
    write_result(out, {**environment(), "rows": rows})


def random_case(rows: int, negatives: int, dim: int, dtype: torch.dtype) -> NegativesCase:
    """Draw unit queries, keys close to them, and a bank with zero velocity, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, dim, generator=generator, dtype=dtype), dim=1)

    q_ND, w_KD = unit(rows), unit(negatives)
    k_ND = F.normalize(q_ND + 2.5 * unit(rows), dim=1)  # about as similar as the most similar of many negatives
    return NegativesCase(q_ND, k_ND, w_KD, torch.zeros_like(w_KD), w_KD.clone())


def kernel_score(case: NegativesCase, implementation: Any) -> Score:
    """Call `score` of an implementation (a module of `kernels` or `kernels.ops.Implementation`)."""
    own_N = torch.arange(len(case.q_ND), device=case.q_ND.device)
    score: Score = implementation.score(case.q_ND, case.k_ND, own_N, case.n_KD, TEMPERATURE, PARAMS.temperature)
    return score


def kernel_adversary(
    case: NegativesCase, implementation: Any, coef_N: Tensor, lr: float | Tensor = PARAMS.lr
) -> AdversaryStats:
    """Call `adversary_step` of an implementation."""
    params = PARAMS._replace(lr=lr)
    stats: AdversaryStats = implementation.adversary_step(case.q_ND, coef_N, case.n_KD, case.w_KD, case.v_KD, params)
    return stats


def kernel_step(case: NegativesCase, implementation: Any) -> StepResult:
    """Take the step with the kernels of an implementation."""
    q_ND, k_ND = case.q_ND, case.k_ND
    score = kernel_score(case, implementation)
    positive_N = (q_ND.to(score.z_N.dtype) * k_ND).sum(1)
    loss = (score.z_N.log() - positive_N / TEMPERATURE).mean()
    accuracy = (positive_N > score.top_N).double().mean()
    grad_ND = (score.o_ND / score.z_N[:, None] - k_ND) / (TEMPERATURE * len(q_ND))
    kernel_adversary(case, implementation, 1 / (score.za_N * len(q_ND)))
    return StepResult(loss, accuracy, grad_ND)


def materialised_step(
    case: NegativesCase, compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f
) -> StepResult:
    """Take the step with the operations of the published code on a transposed case.

    The two functions of the step are compiled by `compile`, for example torch.compile.
    """
    q_ND = case.q_ND.detach().requires_grad_()
    loss, accuracy, positive_NN, negative_NK, n_DK = compile(_contrast)(q_ND, case.k_ND, case.w_KD)
    loss.backward()
    with torch.no_grad():
        case.w_KD, case.v_KD = compile(_ascend)(q_ND, positive_NN, negative_NK, n_DK, case.w_KD, case.v_KD)
    assert q_ND.grad is not None
    return StepResult(loss.detach(), accuracy, q_ND.grad)


def _contrast(q_ND: Tensor, k_ND: Tensor, w_DK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_DK = F.normalize(w_DK, dim=0)
    positive_NN = torch.einsum("nc,ck->nk", q_ND, k_ND.T)
    negative_NK = torch.einsum("nc,ck->nk", q_ND, n_DK)
    logits_NC = torch.cat([positive_NN, negative_NK], dim=1)
    logits_NC /= TEMPERATURE
    own_N = torch.arange(len(q_ND), device=q_ND.device)
    loss = F.cross_entropy(logits_NC, own_N)
    accuracy = (logits_NC.argmax(1) == own_N).double().mean()
    return loss, accuracy, positive_NN.detach(), negative_NK.detach(), n_DK


def _ascend(
    q_ND: Tensor, positive_NN: Tensor, negative_NK: Tensor, n_DK: Tensor, w_DK: Tensor, v_DK: Tensor
) -> tuple[Tensor, Tensor]:
    logits_NC = torch.cat([positive_NN, negative_NK], dim=1) / PARAMS.temperature
    p_NK = torch.softmax(logits_NC, dim=1)[:, len(q_ND) :]
    radial_K = torch.mean(p_NK * negative_NK, dim=0)
    g_DK = torch.einsum("cn,nk->ck", q_ND.T, p_NK) / len(q_ND) - radial_K * n_DK
    g_DK = -g_DK / w_DK.norm(dim=0) / PARAMS.temperature
    v_DK = PARAMS.momentum * v_DK + g_DK + PARAMS.weight_decay * w_DK
    return w_DK - PARAMS.lr * v_DK, v_DK


def _check_agreement(case: NegativesCase, tolerance: float) -> None:
    """Raise RuntimeError unless one step of both implementations gives the same result and the same bank."""
    ours, published = case.map(Tensor.clone), case.transposed()
    got, expected = kernel_step(ours, chunked), materialised_step(published)
    assert ours.v_KD is not None
    assert published.v_KD is not None
    pairs = {
        "loss": (got.loss, expected.loss),
        "accuracy": (got.accuracy, expected.accuracy),
        "gradient of the queries": (got.grad_ND, expected.grad_ND),
        "bank": (ours.w_KD, published.w_KD.T),
        "velocity": (ours.v_KD, published.v_KD.T),
    }
    for name, (value, other) in pairs.items():
        error = ((value - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()
        if not error <= tolerance:  # NaN is an error, too
            raise RuntimeError(
                f"bench kernels: chunked and materialised differ in {name} by {error:.1e} of the largest value"
            )
