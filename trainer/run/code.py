"""The copies that a run keeps, in `code/`, of the files of methods and backbones from outside (`trainer.external`).

`trainer.config_file` replaces a reference to a file in RUN/config.yaml by the copy, so that evaluations and exports use
the code that trained the run. The file of a module `package.file` is copied as a record; the module itself is imported.
"""

from pathlib import Path

from data.references import is_reference
from trainer.config import Config
from trainer.external import CODE, source_file
from trainer.run.files import exists, write_atomically


def copies(config: Config, folder: Path) -> dict[Path, Path]:
    """Return the files that a configuration refers to, by the paths of their copies in the run directory `folder`."""
    found: dict[Path, Path] = {}
    for reference in filter(is_reference, (config.method.name, config.model.backbone)):
        place, file = reference.rpartition(":")[0], source_file(reference)
        copy = folder / CODE / (file.name if place.endswith(".py") else f"{place}.py")
        if found.setdefault(copy, file) != file:
            raise ValueError(f"{found[copy]} and {file} have the same name: rename one, a run keeps copies of both")
    return found


def changed_code(config: Config, folder: Path) -> str | None:
    """Return an error message if a file differs from its copy in the run directory `folder`."""
    for copy, file in copies(config, folder).items():
        if exists(copy) and copy.read_bytes() != file.read_bytes():
            return (
                f"{file} has changed since the run was started, whose copy is {copy}. Restore it, or copy it to {copy} "
                "to go on with the changed code"
            )
    return None


def store_code(config: Config, folder: Path) -> None:
    """Copy the files that a configuration refers to into the run directory `folder`."""
    for copy, file in copies(config, folder).items():
        if copy != file:
            copy.parent.mkdir(exist_ok=True)
            write_atomically(copy, file.read_text(encoding="utf-8"))
