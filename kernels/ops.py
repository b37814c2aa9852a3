"""The operators `adco::score`, `adco::adversary_step` and `adco::hardest`, registered with torch for each device.

A CPU runs `kernels.chunked`. A CUDA device runs `kernels.triton` and falls back to `kernels.chunked`, with one warning,
for queries that the Triton kernels do not take. With TRITON_INTERPRET=1 in the environment, a CPU runs the Triton
kernels too, slowly, in Triton's interpreter: this is how the tests run the whole program on them.

As custom operators they do not break the graph of torch.compile and work on fake tensors.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from kernels import chunked, reference
from kernels.contract import AdversaryParams, AdversaryStats, as_scalar
from kernels.triton import tiles

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)


class Implementation(NamedTuple):
    """One implementation of the three operators."""

    score: Callable[..., Any]
    adversary_step: Callable[..., Any]
    hardest: Callable[..., Any]


@functools.cache
def triton_kernels() -> Implementation:
    """Import the Triton kernels, which a machine without a GPU need not have."""
    from kernels.triton import adversary, hardest, score

    return Implementation(score.score, adversary.adversary_step, hardest.hardest)


def chunked_adversary_step(*args: Any) -> tuple[Tensor, ...]:
    """Run `chunked.adversary_step` with the arguments of the operator."""
    return tuple(chunked.adversary_step(*_adversary_arguments(args)))


def _adversary_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the specification: an operator takes no tensor within `AdversaryParams`."""
    (temperature, *others), lr = args[5:7]
    return *args[:5], AdversaryParams(temperature, lr, *others), *args[7:]


def _run_chunked(name: str, *args: Any) -> tuple[Tensor, ...]:
    if name == "adversary_step":
        return chunked_adversary_step(*args)
    return tuple(getattr(chunked, name)(*args))


def _run_triton(name: str, *args: Any) -> tuple[Tensor, ...]:
    if reason := tiles.unsupported(args[0]):
        _warn_once(reason)
        return _run_chunked(name, *args)
    if name == "adversary_step":
        args = _adversary_arguments(args)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
        return tuple(getattr(triton_kernels(), name)(*args))


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("%s: using the slower PyTorch implementation", reason)


def _register(
    specification: Callable[P, R],
    schema: str,
    fake: Callable[..., tuple[Tensor, ...]],
    mutates_args: tuple[str, ...] = (),
) -> Callable[P, R]:
    """Register an operator with the name, signature and documentation of its specification.

    Args:
        specification: The function of `kernels.reference`. It returns a NamedTuple of tensors.
        schema: The operator's arguments and results in torch's schema language.
        fake: Makes empty results of the right shapes and dtypes, from the operator's arguments.
        mutates_args: Names of the arguments that are updated in place.
    """
    name = specification.__name__
    result_type = get_type_hints(specification)["return"]
    on_cpu = _run_triton if tiles.INTERPRETED else _run_chunked
    operator = torch.library.custom_op(
        f"adco::{name}", functools.partial(on_cpu, name), mutates_args=mutates_args, device_types="cpu", schema=schema
    )
    operator.register_kernel("cuda", functools.partial(_run_triton, name))
    operator.register_fake(fake)

    @functools.wraps(specification)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = result_type(*operator(*args, **kwargs))
        return result

    return call


def _empty(x: Tensor, *shape: int, like: Tensor) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _fake_score(q_ND: Tensor, *_: Any) -> tuple[Tensor, ...]:
    z_N, za_N, top_N = (_empty(q_ND, len(q_ND), like=q_ND) for _ in range(3))
    return z_N, _empty(q_ND, *q_ND.shape, like=q_ND), za_N, top_N


def _fake_adversary_step(q_ND: Tensor, coef_N: Tensor, n_KD: Tensor, *_: Any) -> tuple[Tensor, ...]:
    mass_K, grad_K = (_empty(n_KD, len(n_KD), like=q_ND) for _ in range(2))
    return mass_K, grad_K


def _fake_hardest(q_ND: Tensor, c_CD: Tensor, own_N: Tensor | None, m: int, *_: Any) -> tuple[Tensor, ...]:
    return _empty(q_ND, len(q_ND), m, like=q_ND), q_ND.new_empty(len(q_ND), m, dtype=torch.int64)


score = _register(
    reference.score,
    "(Tensor q_ND, Tensor k_MD, Tensor? own_N, Tensor n_KD, float temperature, float adversary_temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_score,
)
_adversary_operator = _register(
    reference.adversary_step,
    "(Tensor q_ND, Tensor coef_N, Tensor(a!) n_KD, Tensor(b!) w_KD, Tensor(c!)? v_KD, float[] constants, Tensor lr,"
    " Tensor seed, SymInt first=0, Tensor? skip=None) -> (Tensor, Tensor)",
    _fake_adversary_step,
    mutates_args=("n_KD", "w_KD", "v_KD"),
)


@functools.wraps(reference.adversary_step)
def adversary_step(  # noqa: D103 (that of the specification)
    q_ND: Tensor,
    coef_N: Tensor,
    n_KD: Tensor,
    w_KD: Tensor,
    v_KD: Tensor | None,
    params: AdversaryParams,
    seed: int | Tensor = 0,
    first: int = 0,
    skip: Tensor | None = None,
) -> AdversaryStats:
    constants = [params.temperature, params.momentum, params.weight_decay]
    lr, seed = as_scalar(params.lr, q_ND.device), as_scalar(seed, q_ND.device)
    return _adversary_operator(q_ND, coef_N, n_KD, w_KD, v_KD, constants, lr, seed, first, skip)  # type: ignore[arg-type, call-arg]


hardest = _register(
    reference.hardest,
    "(Tensor q_ND, Tensor c_CD, Tensor? own_N, SymInt m, float? below=None) -> (Tensor, Tensor)",
    _fake_hardest,
)
