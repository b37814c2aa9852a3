"""Runs code at sizes that no machine here has: tensors have shapes but no values, and their memory is counted.

    with ShapeOnlyMode() as mode:
        train_step = build_train_step(config, rank_info)
        ...
    print(mode.ledger.peak())

Python, C++ and DeepSpeed see ordinary CPU tensors. An operator on floating-point tensors computes nothing: it only
allocates its results, in the shapes that torch's fake tensors give, and memory that is never touched costs nothing.
Operators on other tensors (indices, sizes, meshes, schedules) run as usual. `item()` of a shape-only tensor returns 0
or False. With a fake process group (torch.testing._internal.distributed.fake_pg) a laptop runs rank 0 of a thousand.

torch.distributed._tools.MemTracker with FakeTensorMode does not get this far (torch 2.14): device meshes and ZeRO's
optimizer read values, `Module.to`, `copy.deepcopy` and DDP's reducer refuse fake tensors, and MemTracker itself fails
on modules with frozen parameters such as the teacher.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from trainer.plan.ledger import MemoryLedger

_SMALL = 65536  # elements up to which a tensor keeps its values if no shape-only tensor is involved
_MANY = 16  # inputs of `cat` for which fake tensors are too slow: ZeRO-3 joins a parameter from a part for each rank
_CPU = DispatchKeySet(DispatchKey.CPU)
_COMPOSITE = ("c10d", "_c10d_functional", "fsdp")  # namespaces of operators that dispatch others, one by one
_COPYING = ("_allgather_base_", "_reduce_scatter_base_")
_VIEWS = ("_unsafe_view", "lift", "lift_fresh")  # views that torch does not declare as such
_FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_RESIZING = ("resize_", "set_")
_READS = ("_local_scalar_dense", "item", "is_nonzero")  # the last two come undivided from within another operator


class ShapeOnlyMode(TorchDispatchMode):
    """Makes tensors shape-only while it is active, see the module's docstring.

    Args:
        implementations: Python code to run instead of an operator, by the operator's name such as "adco::score".

    Raises:
        RuntimeError: From torch's fake tensors, where a shape depends on values.
    """

    def __init__(self, implementations: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.ledger = MemoryLedger()
        self.implementations = implementations or {}
        self.shapes = FakeTensorMode()
        self.fakes: dict[Hashable, Any] = {}  # results by operator and arguments
        self.depth = 0
        self.phases: list[str] = []
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "ShapeOnlyMode":
        if self.depth == 0:  # FSDP frees memory by a method that does not dispatch
            ledger, resize = self.ledger, self._resize

            def resize_(storage: torch.UntypedStorage, size: int) -> None:
                resize(storage, size)
                ledger.track(storage)

            torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)
        self.depth -= 1
        if self.depth == 0:
            torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor handles the operator and dispatches its local operators here
        kind = _kind(func)
        if kind == "view":
            return func(*args, **kwargs)
        if kind == "composite":
            if func._opname in _COPYING and any(map(self._is_shape_only, _tensors(args))):
                # The fake group copies the input to each rank's part of the output, which is slow for 1,000 ranks.
                return func(*tree_map_only(Tensor, lambda x: x.new_empty(0), args), **kwargs)
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        if kind == "profiler":
            if "enter" in func._opname:
                self.phases.append(args[0])
            else:
                self.phases.pop()
            self.ledger.phase = self.phases[0] if self.phases else ""
            return func(*args, **kwargs)
        if (implementation := self.implementations.get(func._schema.name)) is not None:
            with self:
                return implementation(*args, **kwargs)
        return self._run(func, kind, args, kwargs)

    def _run(self, func: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator for real if its inputs have values and it is cheap; else allocate its results only."""
        inputs = _tensors((args, kwargs))
        shape_only = any(map(self._is_shape_only, inputs))
        if kind == "factory":
            out: Tensor = func(*args, **kwargs)
            return self._allocated(out, shape_only=out.is_floating_point())
        if kind == "item":
            return torch.zeros((), dtype=args[0].dtype).item() if shape_only else func(*args)
        real = bool(inputs) and not shape_only and not any(x.is_floating_point() for x in inputs)
        written = [] if real else [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)]
        if real or (written and not shape_only and all(x.numel() <= _SMALL for x in inputs)):
            return self._tracked(func(*args, **kwargs))
        for x in _tensors(written):
            self.ledger.track(x.untyped_storage()).shape_only = True
        if kind == "resizing":
            return self._tracked(func(*args, **kwargs))
        if kind == "in place":
            results = written[: len(func._schema.returns)]
            return results[0] if len(results) == 1 else tuple(results) or None
        if kind == "cat" and len(inputs) > _MANY:
            return self._allocated(_empty_cat(*args, **kwargs))
        fake = self._fake_results(func, args, kwargs)
        if not shape_only and all(x.numel() <= _SMALL or not x.is_floating_point() for x in _tensors(fake)):
            return self._tracked(func(*args, **kwargs))
        return tree_map_only(Tensor, self._allocate_like, fake)

    def _is_shape_only(self, x: Tensor) -> bool:
        entry = self.ledger.live.get(x.untyped_storage()._cdata)
        return entry is not None and entry.shape_only

    def _tracked(self, out: Any) -> Any:
        for x in _tensors(out):
            if x.device.type == "cpu":
                self.ledger.track(x.untyped_storage())
        return out

    def _allocated(self, x: Tensor, shape_only: bool = True) -> Tensor:
        # DTensor finds how to shard an operator by running it on fake tensors, which take no memory.
        if x.device.type == "cpu" and not isinstance(x, FakeTensor):
            self.ledger.track(x.untyped_storage()).shape_only = shape_only
        return x

    def _allocate_like(self, fake: Tensor) -> Tensor:
        return self._allocated(torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device))

    def _fake_results(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the fake results of an operator. They are kept, because layers and steps repeat its arguments."""
        leaves, structure = tree_flatten((args, kwargs))
        key = (func, structure, *map(_described, leaves))
        if key not in self.fakes:
            fake_args, fake_kwargs = tree_unflatten([self._fake(x) for x in leaves], structure)
            with self.shapes:
                self.fakes[key] = func(*fake_args, **fake_kwargs)
        return self.fakes[key]

    def _fake(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        meta = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(self.shapes, meta, x.device)


@functools.cache
def _kind(func: Any) -> str:
    """Classify an operator by how `ShapeOnlyMode` runs it."""
    name, returns = func._opname, func._schema.returns
    if func.is_view or name in _VIEWS:
        return "view"
    if func.namespace in _COMPOSITE:
        return "composite"
    if func.namespace == "profiler":
        return "profiler"
    if name in _READS:
        return "item"
    if name == "cat" and not _written(func):
        return "cat"
    if name in _FACTORIES:
        return "factory"
    if name in _RESIZING:
        return "resizing"
    return "in place" if _written(func) and all(r.alias_info for r in returns) else "other"


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Return position and name of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]


def _empty_cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Return an empty tensor of the shape that torch.cat gives, which ignores tensors of shape [0]."""
    parts = [x for x in tensors if x.shape != (0,)]
    shape = list(parts[0].shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    return parts[0].new_empty(shape)


def _described(argument: Any) -> Hashable:
    """Return what the form of an operator's results depends on: a tensor's metadata, or a value and its type."""
    if isinstance(argument, Tensor):
        return argument.size(), argument.stride(), argument.dtype, argument.device
    return type(argument), argument  # 1 == 1.0


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
