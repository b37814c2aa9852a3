"""The collectives that a process issues, and what each puts on the wire; of real groups and of fake ones.

    with CollectiveTrace() as trace:
        step()
    print(sum(collective.sent for collective in trace.collectives))

On rank 0 of a fake process group (torch.testing._internal.distributed.fake_pg) and with fake tensors
(`with FakeTensorMode(), CollectiveTrace() as trace`) the same code tells what any number of ranks would send, and
needs no peers, no memory and no arithmetic.
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
    """One call. shape, dtype: of the tensor that this rank hands in. ranks: of the group.

    sent: bytes that this rank sends in the ring algorithm, as NCCL's on a large message; that of a broadcast is what
    every rank but the last passes on. A group of one sends nothing.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: str
    ranks: int
    sent: int


# Bytes sent in a ring of R ranks by one that hands in b bytes; all-to-all's follow from how it cuts them.
_RING: dict[str, Callable[[int, int], int]] = {
    "all_gather": lambda b, R: (R - 1) * b,  # (R - 1)/R of the output
    "reduce_scatter": lambda b, R: (R - 1) * b // R,
    "all_reduce": lambda b, R: 2 * (R - 1) * b // R,
    "broadcast": lambda b, R: b if R > 1 else 0,
}
_SILENT = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd", "check_for_nan")  # no payload


class CollectiveTrace(TorchDispatchMode):
    """Lists the collectives issued within it, in order: by torch.distributed, by its functional form, by DTensor.

    collectives: all so far, of forward and backward, and those that C++ issues for DDP. On a fake group DDP's own
    reduction fails (torch 2.14): it needs a communication hook there.
    Raises NotImplementedError at a collective whose traffic is not known here, rather than leave it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it then runs first, and its collectives come back here
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self.collectives += _read(func, _by_name(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def group_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The ranks that a collective is of."""
    return dist.get_process_group_ranks(_group(_by_name(func, args, kwargs)))


def _by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _group(arguments: dict[str, Any]) -> dist.ProcessGroup:
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"])
    return _resolve_process_group(arguments["group_name"])


def _read(func: Any, arguments: dict[str, Any]) -> list[Collective]:
    """One for each tensor that an operator of torch.distributed, called with these arguments, sends."""
    if func._opname in _SILENT:
        return []
    flat = func._opname.replace("_", "")  # allreduce_, all_reduce, _allgather_base_, all_gather_into_tensor_out, ...
    operator = next((o for o in (*_RING, "all_to_all") if flat.startswith(o.replace("_", ""))), None)
    if operator is None:
        raise NotImplementedError(f"{func}: how many bytes it sends is not known")
    handed = next(value for name, value in arguments.items() if name.startswith("input") or name == "tensors")
    tensors: list[Tensor] = tree_leaves(handed)
    group = _group(arguments)
    ranks = group.size()
    if operator == "all_to_all":
        keeps = _keeps(tensors, arguments.get("input_split_sizes"), group)
        sent = [x.nbytes - keep for x, keep in zip(tensors, keeps, strict=True)]
    else:
        sent = [_RING[operator](x.nbytes, ranks) for x in tensors]
    return [
        Collective(operator, tuple(x.shape), str(x.dtype).removeprefix("torch."), ranks, n)
        for x, n in zip(tensors, sent, strict=True)
    ]


def _keeps(tensors: list[Tensor], rows: list[int] | None, group: dist.ProcessGroup) -> list[int]:
    """Bytes of each tensor of an all-to-all that are this rank's own: one tensor cut into rows, or one per rank."""
    if len(tensors) == group.size() > 1:
        return [x.nbytes if rank == group.rank() else 0 for rank, x in enumerate(tensors)]
    (x,) = tensors
    if not rows:
        return [x.nbytes // group.size()]
    return [x.nbytes * rows[group.rank()] // max(sum(rows), 1)]
