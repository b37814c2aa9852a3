"""Files of a run directory: atomic writes, JSON, safetensors, and errors that name the file and the reason."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def existing_parent(folder: Path) -> Path:
    """Return `folder`, or its nearest ancestor that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def exists(path: Path) -> bool:
    """Return whether `path` exists. Raises OSError if that is unknown; `Path.exists` of Python 3.14 returns False."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def unreadable(error: OSError) -> str:
    """Return the message for a file that exists, or may exist, and cannot be read."""
    return f"unreadable: {error.filename}: {error.strerror}"


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path`: a reader, or a crash, sees either the old content or the new one.

    Raises OSError with the path and the number of bytes if the file system refuses.
    """
    # Names of images are valid Unicode, but a page may show a path that is not.
    temporary, content = path.with_name(f".{path.name}.{os.getpid()}"), text.encode("utf-8", "backslashreplace")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror} ({len(content)} bytes needed)", str(path)) from error


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with the mode that the umask gives. Raises OSError if the file system refuses.

    safetensors itself creates files that only their owner can read, and has an exception of its own for a full disk.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise as_os_error(error, path) from error
    path.chmod(mode & 0o777)


def as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Return the operating system's error inside an exception of safetensors."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else OSError(str(error))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON, atomically. Numbers may be those of NumPy and tensors with one element."""
    write_atomically(path, json.dumps(values, indent=2, default=_to_number) + "\n")


def _to_number(x: Any) -> Any:
    if isinstance(x, np.generic | np.ndarray | Tensor) and math.prod(x.shape) == 1:
        return x.item()
    raise TypeError(f"{type(x).__name__} is not a number, text, list or dictionary")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; returns {} if the file does not exist. Raises ValueError if it has something else."""
    if not exists(path):
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: need a JSON object, got {type(values).__name__}")
    return values
