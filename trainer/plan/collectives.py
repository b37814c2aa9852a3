"""Records the collectives that a process issues and the bytes that each puts on the wire.

    with CollectiveTrace() as trace:
        step()
    print(sum(collective.sent for collective in trace.collectives))

It works with real and fake groups. On rank 0 of a fake process group (torch.testing._internal.distributed.fake_pg) and
with fake tensors (`with FakeTensorMode(), CollectiveTrace() as trace`) the same code records the traffic of any number
of ranks, without peers, memory or arithmetic.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """One call.

    Attributes:
        operator: all_gather, reduce_scatter, all_reduce, broadcast or all_to_all.
        shape: Shape of this rank's input; `dtype` is its type.
        ranks: Size of the group.
        sent: Bytes that this rank sends in the ring algorithm, which NCCL uses for large messages. For a broadcast, the
            bytes that every rank but the last passes on. A group of one rank sends nothing.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: str
    ranks: int
    sent: int


# Bytes sent in a ring of R ranks for an input of b bytes. Those of an all-to-all depend on its split sizes.
_RING: dict[str, Callable[[int, int], int]] = {
    "all_gather": lambda b, R: (R - 1) * b,  # (R - 1)/R of the output
    "reduce_scatter": lambda b, R: (R - 1) * b // R,
    "all_reduce": lambda b, R: 2 * (R - 1) * b // R,
    "broadcast": lambda b, R: b if R > 1 else 0,
}
_NO_PAYLOAD = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd", "check_for_nan")


class CollectiveTrace(TorchDispatchMode):
    """Records in `collectives`, in order, all that is issued while it is active.

    It sees torch.distributed, functional collectives, DTensor and the calls that C++ issues for DDP, in forward and
    backward. On a fake group DDP's own reduction fails (torch 2.14) and needs a communication hook.

    Raises:
        NotImplementedError: The traffic of a collective is unknown here; it would be missing in the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor handles the operator and dispatches its collectives here
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self.collectives += _read(func, arguments_by_name(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def group_ranks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the ranks of a collective's group."""
    return dist.get_process_group_ranks(_group(arguments_by_name(func, args, kwargs)))


def arguments_by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call to a torch operator by the names of its schema."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _group(arguments: dict[str, Any]) -> dist.ProcessGroup:
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"])
    return _resolve_process_group(arguments["group_name"])


def _read(func: Any, arguments: dict[str, Any]) -> list[Collective]:
    """Return one collective for each tensor that a call sends."""
    if func._opname in _NO_PAYLOAD:
        return []
    flat = func._opname.replace("_", "")  # allreduce_, all_reduce, _allgather_base_, all_gather_into_tensor_out, ...
    operator = next((o for o in (*_RING, "all_to_all") if flat.startswith(o.replace("_", ""))), None)
    if operator is None:
        raise NotImplementedError(f"{func}: the number of bytes that it sends is unknown")
    inputs = next(value for name, value in arguments.items() if name.startswith("input") or name == "tensors")
    tensors: list[Tensor] = tree_leaves(inputs)
    group = _group(arguments)
    if operator == "all_to_all":
        kept = _kept_bytes(tensors, arguments.get("input_split_sizes"), group)
        sent = [x.nbytes - own for x, own in zip(tensors, kept, strict=True)]
    else:
        sent = [_RING[operator](x.nbytes, group.size()) for x in tensors]
    return [
        Collective(operator, tuple(x.shape), str(x.dtype).removeprefix("torch."), group.size(), n)
        for x, n in zip(tensors, sent, strict=True)
    ]


def _kept_bytes(tensors: list[Tensor], splits: list[int] | None, group: dist.ProcessGroup) -> list[int]:
    """Return the bytes that stay on this rank of each input of an all-to-all.

    The input is one tensor for each rank, or one tensor whose rows are split (evenly without `splits`).
    """
    if len(tensors) == group.size() > 1:
        return [x.nbytes if rank == group.rank() else 0 for rank, x in enumerate(tensors)]
    (x,) = tensors
    if not splits:
        return [x.nbytes // group.size()]
    return [x.nbytes * splits[group.rank()] // max(sum(splits), 1)]
