"""Reading from storage that fails temporarily."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.sources import files
from data.sources.base import UnreadableImage
from data.sources.open import open_source
from tests.data.images import write_folder


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, recorded instead of waited for."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


def failing(times: int, number: int) -> Callable[[], bytes]:
    """Return a function that raises `times` OSErrors and then returns."""
    left = [times]

    def read() -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return b"data"

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_temporary_error(slept: list[float], number: int, times: int) -> None:
    assert files.retry(failing(times, number)) == b"data"
    assert slept == [0.1, 0.5, 2.0][:times]


def test_a_lasting_error(slept: list[float]) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        files.retry(failing(99, errno.EIO))
    assert slept == [0.1, 0.5, 2.0]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR])
def test_permanent_errors_are_not_tried_again(slept: list[float], number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        files.retry(failing(1, number))
    assert slept == []


def test_a_librarys_error_is_not_tried_again(slept: list[float]) -> None:
    def read() -> bytes:
        raise OSError("Corrupt snappy compressed data")

    with pytest.raises(OSError, match="snappy"):
        files.retry(read)
    assert slept == []


def test_a_stale_handle_is_opened_again(tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert files.read_range(str(tmp_path / "x"), 2, 3) == b"234"
    stale, pread = files._open(str(tmp_path / "x")).descriptor, os.pread

    def fails_on_the_stale(descriptor: int, size: int, offset: int) -> bytes:
        if descriptor == stale and not slept:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fails_on_the_stale)
    assert files.read_range(str(tmp_path / "x"), 4, 2) == b"45"
    assert slept == [0.1]
    with pytest.raises(EOFError, match="ends 4 bytes before"):
        files.read_range(str(tmp_path / "x"), 8, 6)


def test_an_image_is_read_despite_a_temporary_error(
    tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_folder(tmp_path / "data", classes=1, per_class=2))
    trouble = [OSError(errno.EIO, "Input/output error")] * 2
    real = open

    def shaky(*args: object, **options: object) -> object:
        if trouble:
            raise trouble.pop()
        return real(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", shaky)
    assert source.image(0).shape == (40, 40, 3)
    assert slept == [0.1, 0.5]
    trouble += [OSError(errno.EIO, "Input/output error")] * 4
    with pytest.raises(UnreadableImage, match=r"^c0/1\.png: Input/output error"):
        source.image(1)
