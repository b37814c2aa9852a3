"""What a step does, in order: the operators with their work, and the collectives between them.

    with Hollow(), StepTrace(ranks_per_node=8) as trace:
        step()
    print(trace.events)

Everything is read from what torch dispatches, in forward and backward and for any engine. Of an operator, the bytes
are those of its inputs and outputs, each once: what must cross the memory's interface where caches are small against
the tensors, and kernels are not fused.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.plan.collectives import Collective, CollectiveTrace, group_of


class Op(NamedTuple):
    """flops: of matrix products. dtype: of what they multiply. exponentials: that are not hidden in an elementwise
    operator, whose bytes take longer."""

    phase: str
    name: str
    dtype: str
    flops: float
    bytes: int
    exponentials: float


class Call(NamedTuple):
    """nodes: over which the group is spread. engine: whether DDP, FSDP or ZeRO issued it, or the method."""

    phase: str
    collective: Collective
    nodes: int
    engine: bool


class StepTrace(CollectiveTrace):
    """events: within it. Phases are `record_function`s, the outermost counts."""

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self.ranks_per_node = ranks_per_node
        self.events: list[Op | Call] = []
        self.phases: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = len(self.collectives)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        phase = self.phases[0] if self.phases else ""
        if out is NotImplemented:  # of a DTensor, what it is made of comes here
            return out
        if func.namespace == "profiler":
            if "enter" in func._opname:
                self.phases.append(args[0])
            else:
                self.phases.pop()
        elif issued := self.collectives[known:]:
            nodes = len({rank // self.ranks_per_node for rank in group_of(func, args, kwargs or {})})
            self.events += [Call(phase, collective, nodes, _by_engine()) for collective in issued]
        elif func.namespace in ("aten", "adco") and not func.is_view and func._opname not in _FREE:
            self.events.append(_work(phase, func, args, kwargs or {}, out))
        return out


# Operators that launch nothing on a GPU.
_FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift", "lift_fresh"),
    *("resize_", "set_", "_local_scalar_dense", "is_pinned", "_has_compatible_shallow_copy_type"),
)


def _work(phase: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Op:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    names = [argument.name for argument in func._schema.arguments]
    by_name = dict(zip(names, args, strict=False)) | kwargs
    changed = [by_name.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    written = [x for x in tree_leaves(changed) if isinstance(x, Tensor)]
    known = {id(x) for x in written}
    bytes = sum(map(_bytes, given)) + sum(map(_bytes, written)) + sum(_bytes(x) for x in made if id(x) not in known)
    bytes += sum(_bytes(by_name[name]) for name in _AGAIN.get(func._opname, ()))
    if func._opname in _FILLED:
        bytes = sum(map(_bytes, written or made))
    product = next((x for x in given if x.is_floating_point()), None)
    dtype = str(product.dtype).removeprefix("torch.") if product is not None else ""
    flops, exponentials = _FLOPS[func._opname](args) if func._opname in _FLOPS else (0.0, 0.0)
    if formula := flop_registry.get(func._overloadpacket):
        flops = float(formula(*args, **kwargs, out_val=out))
    return Op(phase, func._opname, dtype, flops, bytes, exponentials)


# Inputs that a GPU reads twice: BatchNorm's first pass makes sums, the gradient of a convolution is two kernels.
_AGAIN = {
    "native_batch_norm": ("input",),
    "native_batch_norm_backward": ("grad_out", "input"),
    "convolution_backward": ("grad_output",),
}
_FILLED = ("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full")


def _bytes(x: Tensor) -> int:
    """Of the elements that there are: an expanded tensor's are read once."""
    return x.element_size() * math.prod(size for size, step in zip(x.shape, x.stride(), strict=True) if step)


# FLOPs and exponentials of operators that torch's table does not have, from their arguments.
# Two products, and with T / T_a = 6 one exponential for both temperatures (`trainer.plan.roofline`).
def _score(args: tuple[Any, ...]) -> tuple[float, float]:
    _, q_ND, k_MD, _, n_KD, *_ = args
    scores = float(len(q_ND) * (len(k_MD) + len(n_KD)))
    return 4 * scores * q_ND.shape[1], scores


def _adversary_step(args: tuple[Any, ...]) -> tuple[float, float]:
    _, q_ND, _, n_KD, *_ = args
    scores = float(len(q_ND) * len(n_KD))
    return 4 * scores * q_ND.shape[1], scores


def _hardest(args: tuple[Any, ...]) -> tuple[float, float]:
    _, q_ND, c_CD, *_ = args
    return 2.0 * len(q_ND) * len(c_CD) * q_ND.shape[1], 0.0


def _attention(products: int) -> Callable[[tuple[Any, ...]], tuple[float, float]]:
    """Of flash attention on a CPU, which a GPU has another name for: queries, keys [..., L, E] come last but one."""

    def count(args: tuple[Any, ...]) -> tuple[float, float]:
        q, k = args[products // 3], args[products // 3 + 1]  # backward's first argument is the gradient
        return 2.0 * products * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1], q.shape[:-1].numel() * k.shape[-2]

    return count


_FLOPS: dict[str, Callable[[tuple[Any, ...]], tuple[float, float]]] = {
    "score": _score,
    "adversary_step": _adversary_step,
    "hardest": _hardest,
    "_scaled_dot_product_flash_attention_for_cpu": _attention(2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention(5),  # scores again, dV, dP, dQ, dK
}


def _by_engine() -> bool:
    """Whether the innermost code that issues a collective is not the method's; DDP's own has no Python frame."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/fsdp/" in file or "/deepspeed/" in file or "/plan/memory" in file:
            return True
        if "/models/" in file:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return True
