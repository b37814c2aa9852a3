"""Reading from large files on storage that may fail temporarily."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from data.names import to_text

T = TypeVar("T")

DELAYS = (0.1, 0.5, 2.0)  # seconds before each further attempt
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def retry(read: Callable[[], T]) -> T:
    """Call `read`, and again after each of DELAYS if it fails for a temporary reason (network storage, EIO, ESTALE).

    Raises:
        OSError: The last error. A missing or forbidden file is not tried again, and neither is an error without errno,
            which is a library's and not the operating system's.
    """
    for delay in DELAYS:
        try:
            return read()
        except PERMANENT:
            raise
        except OSError as error:
            if error.errno is None:
                raise
        time.sleep(delay)
    return read()


def short_names(files: list[Path]) -> list[str]:
    """Return different names for files, as text: their base names, or their paths from the folder that has all."""
    paths = [os.fsencode(file.absolute()) for file in files]
    bases = [os.path.basename(path) for path in paths]
    if len(set(bases)) < len(set(paths)):
        common = os.path.commonpath(paths)
        bases = [os.path.relpath(path, common) for path in paths]
    return [to_text(base) for base in bases]


def read_file(path: str | bytes | Path) -> bytes:
    """Return the contents of a file. Raises OSError after `retry` gives up."""

    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read()

    return retry(read)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset`.

    Files stay open, because on parallel file systems opening a file costs more than reading an image.

    Raises:
        OSError: `retry` gave up.
        EOFError: The file is too short.
    """

    def read() -> bytes:
        try:
            return os.pread(_open(path).descriptor, size, offset)
        except OSError:
            _open.cache_clear()  # a stale handle stays stale
            raise

    data = retry(read)
    if len(data) < size:
        raise EOFError(f"{path} ends {size - len(data)} bytes before the end of the image")
    return data


class _OpenFile:
    """A file that is closed with the last reference: one thread may read it while another drops it from the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=128)  # per process; the usual limit on open files is 1024
def _open(path: str) -> _OpenFile:
    return _OpenFile(path)
