"""Methods, backbones and evaluations from outside of the project; see docs/extend.md."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from data.references import is_reference, normalise, resolve

CODE = "code"  # the folder in a run directory with copies of the files, see `trainer.run.code`

# The type of a setting that is a reference, or the name of something known.
Reference = Annotated[str, AfterValidator(normalise)]


def short_name(value: Any) -> Any:
    """Return a reference to a file without the folder of the file, for reports; any other value as it is."""
    return value.rsplit("/", 1)[-1] if is_reference(value) else value


def source_file(reference: str) -> Path:
    """Return the file of a reference. Raises ValueError as `resolve` does."""
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    resolve(reference)
    return Path(inspect.getfile(sys.modules[place]))
