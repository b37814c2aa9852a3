"""Runs code at sizes that no machine here has: its tensors have no values, and the memory they would take is counted.

    with Hollow() as hollow:
        game = make_game(config, place)
        ...
    print(hollow.ledger.peak())

Every tensor is a real one on the CPU, to Python, to C++ and to DeepSpeed alike, but nothing is computed: an operation
on floating-point tensors only makes its results, of the shapes that torch's fake tensors tell, from memory that is
never touched and so costs nothing. What is computed without such tensors is real: indices, sizes, meshes, schedules.
`item()` of a tensor without values is 0 or False. Together with a fake process group
(torch.testing._internal.distributed.fake_pg) a laptop runs rank 0 of a thousand.

Fake tensors themselves do not get so far (torch 2.14): a device mesh needs values, `Module.to`, DDP's reducer and
ZeRO's flat buffers refuse them.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 65536  # numbers that a tensor made without any hollow one may have to get real values; integers always do
_MANY = 16  # tensors for which fake ones take too long: ZeRO-3 puts a parameter together from a part for each rank
_CPU = DispatchKeySet(DispatchKey.CPU)
_COMPOSED = ("c10d", "_c10d_functional", "fsdp")  # operators made of others, which then come here one by one
_COPIED = ("_allgather_base_", "_reduce_scatter_base_")
_VIEWS = ("_unsafe_view", "lift", "lift_fresh")  # without saying so
_FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_RESHAPED = ("resize_", "set_")


class Peak(NamedTuple):
    """The most bytes that were alive at once. phase: the outermost `record_function` then, "" for none.

    parts: bytes by tag; "" for those without.
    """

    total: int
    phase: str
    parts: dict[str, int]


class Storage:
    """One that is alive. number: of all that were ever; hollow: without values; watch: tells of its end."""

    __slots__ = ("hollow", "number", "size", "watch")

    def __init__(self, number: int, watch: object) -> None:
        self.number, self.size, self.hollow, self.watch = number, 0, False, watch


class Ledger:
    """Which storages were alive when.

    events: number of a storage, bytes that it grew by, phase. born: phase by number. tags: by number. live: by address.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, int, str]] = []
        self.born: list[str] = []
        self.tags: dict[int, str] = {}
        self.live: dict[int, Storage] = {}
        self.phase = ""

    def see(self, storage: torch.UntypedStorage) -> Storage:
        """Enter a storage, or what it grew or shrank by since it was last seen."""
        key, size = storage._cdata, storage.nbytes()
        entry = self.live.get(key)
        if entry is None:
            entry = self.live[key] = Storage(len(self.born), weakref.ref(storage, lambda _: self._gone(key)))
            self.born.append(self.phase)
        if size != entry.size:
            self.events.append((entry.number, size - entry.size, self.phase))
            entry.size = size
        return entry

    def tag(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Name the storages of tensors that are alive and have no name."""
        for x in tensors:
            if entry := self.live.get(x.untyped_storage()._cdata):
                self.tags.setdefault(entry.number, name)

    def tag_rest(self, name: str, born: str | None = None) -> None:
        """Name all that are alive and have no name; of one phase only."""
        for entry in self.live.values():
            if born is None or self.born[entry.number] == born:
                self.tags.setdefault(entry.number, name)

    def peak(self) -> Peak:
        """Over all events so far."""
        live = most = at = 0
        for i, (_, size, _) in enumerate(self.events):
            live += size
            if live > most:
                most, at = live, i
        parts: dict[str, int] = {}
        for number, size, _ in self.events[: at + 1]:
            tag = self.tags.get(number, "")
            parts[tag] = parts.get(tag, 0) + size
        return Peak(most, self.events[at][2] if self.events else "", parts)

    def _gone(self, key: int) -> None:
        entry = self.live.pop(key)
        if entry.size:
            self.events.append((entry.number, -entry.size, self.phase))


class ShapeOnlyMode(TorchDispatchMode):
    """See the module. composed: operators that run as this code instead, by name, such as "adco::score".

    Raises what torch's fake tensors raise where a shape depends on values that are not there.
    """

    def __init__(self, composed: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.composed = composed or {}
        self.shapes = FakeTensorMode()
        self.depth = 0
        self.phases: list[str] = []
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "ShapeOnlyMode":
        if self.depth == 0:  # FSDP gives memory back by a method that no mode sees
            ledger, resize = self.ledger, self._resize

            def resize_(storage: torch.UntypedStorage, size: int) -> None:
                resize(storage, size)
                ledger.see(storage)

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
            return NotImplemented  # it then runs first, and what it is made of comes back here
        kind = _kind(func)
        if kind == "view":
            return func(*args, **kwargs)
        if kind == "composed":
            if func._opname in _COPIED and any(map(self._is_hollow, _tensors(args))):
                # The fake group copies the input to each rank's part of the output, which takes long for a thousand.
                return func(*_map(lambda x: x.new_empty(0), args), **kwargs)
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        if kind == "profiler":
            return self._profiler(func, args, kwargs)
        if (code := self.composed.get(func._schema.name)) is not None:
            with self:
                return code(*args, **kwargs)
        return self._run(func, kind, args, kwargs)

    def _profiler(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "enter" in func._opname:
            self.phases.append(args[0])
        else:
            self.phases.pop()
        self.ledger.phase = self.phases[0] if self.phases else ""
        return func(*args, **kwargs)

    def _run(self, func: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors((args, kwargs)))
        hollow = any(self._is_hollow(x) for x in tensors)
        if kind == "factory":
            return self._made(func(*args, **kwargs), floats_only=True)
        if kind == "item":
            return torch.zeros((), dtype=args[0].dtype).item() if hollow else func(*args)
        real = bool(tensors) and not hollow and not any(x.is_floating_point() for x in tensors)
        written = [] if real else [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)]
        if real or (written and not hollow and all(x.numel() <= _SMALL for x in tensors)):
            return self._seen(func(*args, **kwargs))
        for x in _tensors(written):
            self.ledger.see(x.untyped_storage()).hollow = True
        if kind == "reshaped":
            return self._seen(func(*args, **kwargs))
        if kind == "in place":
            results = written[: len(func._schema.returns)]
            return results[0] if len(results) == 1 else tuple(results) or None
        if kind == "cat" and len(tensors) > _MANY:
            return self._made(_empty_cat(*args, **kwargs))
        with self.shapes:
            out = func(*_map(self._fake, args), **_map(self._fake, kwargs))
        if not hollow and all(x.numel() <= _SMALL or not x.is_floating_point() for x in _tensors(out)):
            return self._seen(func(*args, **kwargs))
        return _map(self._make, out)

    def _is_hollow(self, x: Tensor) -> bool:
        entry = self.ledger.live.get(x.untyped_storage()._cdata)
        return entry is not None and entry.hollow

    def _seen(self, out: Any) -> Any:
        for x in _tensors(out):
            if x.device.type == "cpu":
                self.ledger.see(x.untyped_storage())
        return out

    def _made(self, x: Tensor, floats_only: bool = False) -> Tensor:
        if x.device.type == "cpu":
            self.ledger.see(x.untyped_storage()).hollow = x.is_floating_point() or not floats_only
        return x

    def _make(self, fake: Tensor) -> Tensor:
        return self._made(torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device))

    def _fake(self, x: Tensor) -> Tensor:
        meta = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(self.shapes, meta, x.device)


@functools.cache
def _kind(func: Any) -> str:
    name, returns = func._opname, func._schema.returns
    if func.is_view or name in _VIEWS:
        return "view"
    if func.namespace in _COMPOSED:
        return "composed"
    if func.namespace == "profiler":
        return "profiler"
    if name == "_local_scalar_dense":
        return "item"
    if name == "cat" and not _written(func):
        return "cat"
    if name in _FACTORIES:
        return "factory"
    if name in _RESHAPED:
        return "reshaped"
    return "in place" if _written(func) and all(r.alias_info for r in returns) else "other"


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]


def _empty_cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """What torch.cat would give, without values."""
    parts = [x for x in tensors if x.shape != (0,)]  # cat overlooks these
    shape = list(parts[0].shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    return parts[0].new_empty(shape)


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for x in tree:
            yield from _tensors(x)
    elif isinstance(tree, dict):
        for x in tree.values():
            yield from _tensors(x)


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_map(function, x) for x in tree)
    if isinstance(tree, dict):
        return {name: _map(function, x) for name, x in tree.items()}
    return tree
