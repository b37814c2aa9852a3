"""The lines of a record of `bench gpu`: each has a number, what it is compared with, and a verdict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Verdict = Literal["passed", "failed", "slow", "skipped"]


class Setting(NamedTuple):
    """The inputs of a part: the device that is tested, and the record's folder for further files."""

    device: torch.device
    folder: Path

    @property
    def small(self) -> bool:
        """Return whether the part runs on a CPU, with small sizes, so that every line is executed."""
        return self.device.type == "cpu"

    def pick(self, on_gpu: int, on_cpu: int) -> int:
        """Return a size for a GPU, or the one for a CPU."""
        return on_cpu if self.small else on_gpu


class Line(NamedTuple):
    """One comparison.

    Attributes:
        name: What was measured.
        verdict: The result of the comparison.
        value: The measured number; None if nothing was measured.
        bound: The number that it is compared with.
        unit: Unit of both.
        note: Where the bound comes from, or why the line failed or was skipped.
        details: Further numbers for the record.
    """

    name: str
    verdict: Verdict
    value: float | None = None
    bound: float | None = None
    unit: str = ""
    note: str = ""
    details: Mapping[str, object] = {}


def at_most(
    name: str, value: float, bound: float, note: str, unit: str = "", details: Mapping[str, object] | None = None
) -> Line:
    """Pass if the value is at most the bound; NaN fails."""
    return Line(name, "passed" if value <= bound else "failed", value, bound, unit, note, details or {})


def in_time(
    name: str, value: float, bound: float, note: str, unit: str = "ms", details: Mapping[str, object] | None = None
) -> Line:
    """Pass if the value is at most the bound, and be slow otherwise."""
    return Line(name, "passed" if value <= bound else "slow", value, bound, unit, note, details or {})


def fast_enough(
    name: str, value: float, bound: float, note: str, unit: str = "", details: Mapping[str, object] | None = None
) -> Line:
    """Pass if the value is at least the bound, and be slow otherwise."""
    return Line(name, "passed" if value >= bound else "slow", value, bound, unit, note, details or {})


def holds(name: str, condition: bool, note: str, details: Mapping[str, object] | None = None) -> Line:
    """Pass if a condition is true."""
    return Line(name, "passed" if condition else "failed", note=note, details=details or {})


def skipped(name: str, reason: str, value: float | None = None, unit: str = "") -> Line:
    """Return a line for what could not be compared."""
    return Line(name, "skipped", value, unit=unit, note=reason)
