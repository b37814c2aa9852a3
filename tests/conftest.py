"""What holds for all tests."""

import logging
import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_fork_server() -> None:
    """Ranks and workers of all tests start from a server that has imported what they need.

    There is one in a process, and who starts it decides what it imports: a loader's would have the ranks of later
    tests import torch and timm each for itself, for seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["trainer.pretrain", "timm"])
    forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A run sets up the logging of the process it is in; the next test starts without that."""
    yield
    for name in ("trainer", "data", "models", "kernels"):
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = [], True
        ours.setLevel(logging.NOTSET)
