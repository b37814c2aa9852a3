"""Lists what a step does in order: its operators with their work, and its collectives.

    with ShapeOnlyMode(), StepTrace(ranks_per_node=8) as trace:
        step()
    print(trace.events)

Events are read from what torch dispatches, in forward and backward and for any engine. An operator's bytes are those of
its inputs and outputs, each once: they must cross the memory interface if the caches are small against the tensors and
kernels are not fused.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.plan.collectives import Collective, CollectiveTrace, arguments_by_name, group_ranks


class Use(NamedTuple):
    """Memory that an operator reads or writes: a number for the storage within a trace, first byte, and length."""

    tensor: int
    start: int
    bytes: int


class OperatorEvent(NamedTuple):
    """One operator in a phase of the step ("" outside of all phases).

    Attributes:
        dtype: Type of its first floating-point tensor.
        flops: FLOPs of matrix products.
        bytes: Bytes that it reads and writes.
        exponentials: Number of exponentials; 0 for elementwise operators, whose bytes take longer.
        reads: The tensors that it reads.
        writes: Those that it writes.
        compiled: Whether compiled code launches it, see `trainer.plan.fusion`.
        replayed: Whether a CUDA graph launches it.
    """

    phase: str
    name: str
    dtype: str
    flops: float
    bytes: int
    exponentials: float
    reads: tuple[Use, ...] = ()
    writes: tuple[Use, ...] = ()
    compiled: bool = False
    replayed: bool = False


class CollectiveEvent(NamedTuple):
    """One collective, the number of nodes of its group, and whether an engine issued it and not the method."""

    phase: str
    collective: Collective
    nodes: int
    engine: bool


Event = OperatorEvent | CollectiveEvent


class StepTrace(CollectiveTrace):
    """Records `events` while it is active.

    The outermost `record_function` is the phase of an event.
    """

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self.ranks_per_node = ranks_per_node
        self.events: list[Event] = []
        self.phases: list[str] = []
        self._tensors: dict[int, int] = {}  # numbers by address of the storage
        self._numbers = itertools.count()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = len(self.collectives)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is NotImplemented:  # a DTensor's operator, which dispatches its local operators here
            return out
        phase = self.phases[0] if self.phases else ""
        if func.namespace == "profiler":
            if "enter" in func._opname:
                self.phases.append(args[0])
            else:
                self.phases.pop()
        elif issued := self.collectives[known:]:
            nodes = len({rank // self.ranks_per_node for rank in group_ranks(func, args, kwargs or {})})
            self.events += [CollectiveEvent(phase, collective, nodes, _by_engine()) for collective in issued]
        elif func.namespace in ("aten", "adco") and not func.is_view and func._opname not in _NO_LAUNCH:
            self.events.append(self._operator_event(phase, func, args, kwargs or {}, out))
        elif func._opname in _FACTORIES:
            self._forget(out)
        return out

    def _operator_event(
        self, phase: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> OperatorEvent:
        arguments = arguments_by_name(func, args, kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        written = _tensors(
            [
                arguments.get(a.name)
                for a in func._schema.arguments
                if a.alias_info and a.alias_info.is_write and a.name not in _NOT_WRITTEN
            ]
        )
        updated = {id(x) for x in written}
        made = [x for x in outputs if id(x) not in updated]
        only_written = {id(x) for x in _tensors([arguments.get(a.name) for a in func._schema.arguments if a.is_out])}
        reads = [] if func._opname in _FILLS else [x for x in inputs if id(x) not in only_written]
        reads_again = [arguments[name] for name in _READ_TWICE.get(func._opname, ())]
        bytes = sum(map(_bytes, [*reads, *reads_again, *written, *made]))
        floats = (str(x.dtype).removeprefix("torch.") for x in inputs if x.is_floating_point())
        flops, exponentials = _WORK[func._opname](args) if func._opname in _WORK else (0.0, 0.0)
        if formula := flop_registry.get(func._overloadpacket):
            flops = float(formula(*args, **kwargs, out_val=out))
        read_uses = tuple(map(self._use, reads))
        self._forget(made)
        write_uses = tuple(map(self._use, [*written, *made]))
        dtype = next(floats, "")
        return OperatorEvent(phase, func._opname, dtype, flops, bytes, exponentials, read_uses, write_uses)

    def _use(self, x: Tensor) -> Use:
        number = self._tensors.setdefault(x.untyped_storage()._cdata, next(self._numbers))
        return Use(number, int(x.storage_offset()) * x.element_size(), _bytes(x))

    def _forget(self, made: Any) -> None:
        """Give new tensors new numbers, as their addresses may be those of tensors that are gone."""
        for x in _tensors(made):
            self._tensors.pop(x.untyped_storage()._cdata, None)


# Operators that launch no kernel on a GPU.
_FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_NO_LAUNCH = (
    *(*_FACTORIES, "_unsafe_view", "lift", "lift_fresh"),
    *("resize_", "set_", "_local_scalar_dense", "is_pinned", "_has_compatible_shallow_copy_type"),
)
# Operators that only write.
_FILLS = ("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full")
_NOT_WRITTEN = ("grads",)  # fused optimizers write gradients only to unscale them
# Inputs that a GPU reads twice: BatchNorm's first pass sums up, and a convolution's gradient is two kernels.
_READ_TWICE = {
    "native_batch_norm": ("input",),
    "native_batch_norm_backward": ("grad_out", "input"),
    "convolution_backward": ("grad_output",),
}


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """Return the bytes of the elements that are stored: those of an expanded tensor are read once."""
    return x.element_size() * math.prod(size for size, step in zip(x.shape, x.stride(), strict=True) if step)


# FLOPs and exponentials of operators that are not in torch's `flop_registry`, from their arguments.


def _score(args: tuple[Any, ...]) -> tuple[float, float]:
    """Two products, and as T / T_a = 6 one exponential for both temperatures (`trainer.plan.roofline`)."""
    q_ND, k_MD, _, n_KD, *_ = args
    scores = float(len(q_ND) * (len(k_MD) + len(n_KD)))
    return 4 * scores * q_ND.shape[1], scores


def _adversary_step(args: tuple[Any, ...]) -> tuple[float, float]:
    q_ND, _, n_KD, *_ = args
    scores = float(len(q_ND) * len(n_KD))
    return 4 * scores * q_ND.shape[1], scores


def _hardest(args: tuple[Any, ...]) -> tuple[float, float]:
    q_ND, c_CD, *_ = args
    return 2.0 * len(q_ND) * len(c_CD) * q_ND.shape[1], 0.0


def _attention(args: tuple[Any, ...]) -> tuple[float, float]:
    q, k, *_ = args  # [..., L, E]
    return _attention_products(2, q, k)


def _attention_backward(args: tuple[Any, ...]) -> tuple[float, float]:
    _, q, k, *_ = args
    return _attention_products(5, q, k)  # the scores again, dV, dP, dQ and dK


def _attention_products(products: int, q: Tensor, k: Tensor) -> tuple[float, float]:
    scores = q.shape[:-1].numel() * k.shape[-2]
    return 2.0 * products * scores * q.shape[-1], scores


_WORK: dict[str, Callable[[tuple[Any, ...]], tuple[float, float]]] = {
    "score": _score,
    "adversary_step": _adversary_step,
    "hardest": _hardest,
    # Flash attention on a CPU has its own operators.
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


def _by_engine() -> bool:
    """Return whether the innermost caller of a collective is an engine and not the method.

    DDP's own reduction is C++ and has no Python frame.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/fsdp/" in file or "/deepspeed/" in file or "/plan/dry_run" in file:
            return True
        if "/models/" in file:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return True
