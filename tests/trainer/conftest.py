"""What several tests of the trainer use."""

from collections.abc import Iterator

import pytest
import torch

from trainer.distributed import process_group


@pytest.fixture
def group() -> Iterator[None]:
    with process_group("cpu"):
        yield


@pytest.fixture
def small_group(group: None) -> Iterator[None]:
    """With one thread: for networks so small, many are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
