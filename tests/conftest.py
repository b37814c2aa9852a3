"""What holds for all tests."""

import gc
import logging
import os
from collections.abc import Generator, Iterator

import pytest

# Several processes share the cores: those of pytest, and ranks and workers of a test. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests import millions of objects that stay, through which the collector would look again and again.
gc.set_threshold(50_000)


def pytest_xdist_auto_num_workers() -> int:
    """One process of pytest more than cores, because some tests wait; each takes about 1 GB of memory."""
    return min(len(os.sched_getaffinity(0)) + 1, 8)


# Files that take a process minutes. Started last, one of them would run alone at the end.
LONG = ("test_pretrain.py", "test_engines.py", "test_storage.py", "test_plan_collectives.py", "test_triton.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that mostly wait, for SLURM, so that other processes compute meanwhile; then long files."""
    items.sort(key=lambda item: ("slurm" not in item.path.parts, item.path.name not in LONG))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Replace names that are not UTF-8 in what a test printed: a report with them cannot be sent between processes."""
    report = yield
    report.sections = [(title, _encodable(text)) for title, text in report.sections]
    failure = str(report.longrepr)
    if _encodable(failure) != failure:
        report.longrepr = _encodable(failure)
    return report


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@pytest.fixture(scope="session", autouse=True)
def _one_fork_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranks and workers of all tests start from a server that has imported what they need."""
    if all("kernels" in item.path.parts for item in request.session.items):
        return  # these start none; the Triton kernels have pytest processes of their own
    from tests.processes import start_fork_server

    start_fork_server(tmp_path_factory.mktemp("library"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A run sets up the logging of the process it is in; the next test starts without that."""
    yield
    for name in ("trainer", "data", "models", "kernels"):
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = [], True
        ours.setLevel(logging.NOTSET)
