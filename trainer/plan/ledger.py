"""Accounts for the memory of tensors: which storages were alive when, and how large they were."""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class MemoryPeak(NamedTuple):
    """The most bytes that were alive at once, the phase of that moment, and bytes by tag ("" without a tag)."""

    total: int
    phase: str
    parts: dict[str, int]


class TrackedStorage:
    """A storage that is or was alive.

    Attributes:
        created_in: Phase in which it was created.
        size: Its bytes now.
        tag: The part of the memory that it counts for, or "".
        shape_only: Whether its values are undefined (`trainer.plan.shape_only`).
        end: Weak reference whose callback runs when the storage is freed.
    """

    __slots__ = ("created_in", "end", "shape_only", "size", "tag")

    def __init__(self, created_in: str) -> None:
        self.created_in, self.size, self.tag, self.shape_only = created_in, 0, "", False
        self.end: object = None


class MemoryLedger:
    """Records when storages are created, resized and freed.

    Attributes:
        events: Storage, bytes that it grew by, and phase, in order.
        live: The storages that are alive, by address.
        phase: The current phase, set by the owner of the ledger.
    """

    def __init__(self) -> None:
        self.events: list[tuple[TrackedStorage, int, str]] = []
        self.live: dict[int, TrackedStorage] = {}
        self.phase = ""

    def track(self, storage: torch.UntypedStorage) -> TrackedStorage:
        """Record a storage, or the change of its size since the last call."""
        key, size = storage._cdata, storage.nbytes()
        entry = self.live.get(key)
        if entry is None:
            entry = self.live[key] = TrackedStorage(self.phase)
            entry.end = weakref.ref(storage, lambda _: self._freed(key))
        if size != entry.size:
            self.events.append((entry, size - entry.size, self.phase))
            entry.size = size
        return entry

    def tag(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """Tag the storages of these tensors, unless they have a tag."""
        for x in tensors:
            if entry := self.live.get(x.untyped_storage()._cdata):
                entry.tag = entry.tag or tag

    def tag_rest(self, tag: str, created_in: str | None = None) -> None:
        """Tag all storages that are alive and have no tag, or only those that were created in one phase."""
        for entry in self.live.values():
            if created_in is None or entry.created_in == created_in:
                entry.tag = entry.tag or tag

    def peak(self) -> MemoryPeak:
        """Return the peak of all events so far."""
        live = most = at = 0
        for i, (_, size, _) in enumerate(self.events):
            live += size
            if live > most:
                most, at = live, i
        parts: dict[str, int] = {}
        for entry, size, _ in self.events[: at + 1]:
            parts[entry.tag] = parts.get(entry.tag, 0) + size
        return MemoryPeak(most, self.events[at][2] if self.events else "", parts)

    def _freed(self, key: int) -> None:
        entry = self.live.pop(key)
        entry.end = None
        if entry.size:
            self.events.append((entry, -entry.size, self.phase))
