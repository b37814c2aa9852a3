"""What several tests of the trainer use."""

import logging
from collections.abc import Iterator

import pytest

from trainer.distributed import started


@pytest.fixture
def group() -> Iterator[None]:
    with started("cpu"):
        yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("trainer"), "propagate", True)  # `set_up_logging` may have cut it off
    return caplog
