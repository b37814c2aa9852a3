"""What holds for all tests."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A run sets up the logging of the process it is in; the next test starts without that."""
    yield
    for name in ("trainer", "data", "models", "kernels"):
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = [], True
        ours.setLevel(logging.NOTSET)
