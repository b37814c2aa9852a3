"""Small files of a run directory: atomic writes and JSON."""

import json
import os
from pathlib import Path
from typing import Any


def existing_parent(folder: Path) -> Path:
    """Return `folder`, or its nearest ancestor that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path`: a reader, or a crash, sees either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON, atomically."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; returns {} if the file does not exist."""
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
