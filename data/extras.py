"""Optional packages: requirements/NAME.txt installs each of them, and what needs one that is missing says so."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def requirement_file(extra: str) -> str:
    """Return the requirement file of an extra; DALI has one for each build of torch."""
    is_cuda_12 = (torch.version.cuda or "").startswith("12.")
    return f"requirements/{'dali-cuda12' if extra == 'dali' and is_cuda_12 else extra}.txt"


def is_installed(package: str) -> bool:
    """Return whether an optional package is installed."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # nor is the package that contains it
        return False


@contextmanager
def optional_import(extra: str, user: str) -> Iterator[None]:
    """Import optional packages in a `with` block.

    Args:
        extra: Name of the extra that installs them, such as "deepspeed".
        user: What needs them, such as the setting "engine.kind=deepspeed".

    Raises:
        ValueError: One of them is not installed. A package that is installed but fails raises its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        install = f"pip install -r {requirement_file(extra)}"
        raise ValueError(f"{user} needs {error.name}, which is not installed: {install}") from error
