"""Reading from files of any size, on storage that may fail for a moment."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DELAYS = (0.1, 0.5, 2.0)  # seconds before each further attempt
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def retried(read: Callable[[], T]) -> T:
    """`read()`, again after each of DELAYS while it fails for a reason that may pass (network storage, EIO, ESTALE).

    Raises the last OSError. Not tried again: a file that is missing or forbidden, and errors that are not of the
    operating system (a library's, without errno).
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


def read_file(path: str | bytes | Path) -> bytes:
    """The whole file. Raises OSError after `retried` gives up."""

    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return file.read()

    return retried(read)


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises OSError after `retried` gives up, EOFError if the file ends before.

    Files stay open: on parallel file systems opening one costs more than reading a picture.
    """

    def read() -> bytes:
        try:
            return os.pread(_opened(path).descriptor, size, offset)
        except OSError:
            _opened.cache_clear()  # a stale handle stays stale
            raise

    data = retried(read)
    if len(data) < size:
        raise EOFError(f"{path} ends {size - len(data)} bytes before the end of the picture")
    return data


class _OpenFile:
    """Closed when the last one who holds it lets go: a thread may still read what another drops from the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=128)  # of a process; the usual limit on open files is 1024
def _opened(path: str) -> _OpenFile:
    return _OpenFile(path)
