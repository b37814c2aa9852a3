"""Python objects that a setting names: `module:attribute` or `file.py:attribute`.

The code has all rights of the user, as any module that Python imports.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from data.paths import absolute

REFERENCE = re.compile(r"(?P<place>.+\.py|[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_]\w*)", re.DOTALL)


def is_reference(text: object) -> bool:
    """Return whether a text names something outside; `hf-hub:timm/resnet50.a1_in1k` is a name of timm."""
    return isinstance(text, str) and REFERENCE.fullmatch(text) is not None


def normalise(text: str) -> str:
    """Return a reference to a file with the absolute path of the file, and any other text as it is."""
    place, _, attribute = text.rpartition(":")
    return f"{absolute(place)}:{attribute}" if is_reference(text) and place.endswith(".py") else text


def resolve(reference: str) -> Any:
    """Import a module or a file, and return its attribute. A file is executed once in a process.

    Raises:
        ValueError: There is no such file, module or attribute, or its code raises an exception while it is imported.
    """
    place, _, attribute = normalise(reference).rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the code of the user raises; TRAINER_TRACEBACK=1 shows where
        raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        own = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
        raise ValueError(f"{place} has no {attribute}; it has {', '.join(own) or 'nothing'}")
    return getattr(module, attribute)


def _import_file(path: Path) -> ModuleType:
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pydantic looks for the names of annotations there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
