"""What several tests of the trainer use."""

from collections.abc import Iterator

import pytest

from trainer.distributed import started


@pytest.fixture
def group() -> Iterator[None]:
    with started("cpu"):
        yield
