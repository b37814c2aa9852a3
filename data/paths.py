"""Paths that a user writes, in settings and on the command line.

`~` and `~user` become home directories and a relative path becomes absolute. Environment variables are not expanded:
`$HOME/images` in a YAML file is a folder named `$HOME`; on the command line the shell has already expanded it.
"""

from pathlib import Path


def expand_user(text: str) -> str:
    """Replace `~` or `~user` at the start of a path by the home directory. Raises ValueError for an unknown user."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        user = text.split("/")[0]
        raise ValueError(f"there is no home directory {user}; for a file of this name write ./{text}") from None


def absolute(text: str) -> str:
    """Expand `~` and prepend the working directory to a relative path. Raises ValueError for an empty text."""
    if not text:
        raise ValueError("need a path")
    return str(Path(expand_user(text)).absolute())
