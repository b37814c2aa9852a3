"""Tensors without values: nothing is computed, the memory is counted, and what does not depend on them is real."""

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from trainer.plan.ledger import MemoryPeak
from trainer.plan.shape_only import ShapeOnlyMode

MIB = 2**20


def test_gibibytes_are_counted_and_not_taken() -> None:
    with ShapeOnlyMode() as mode:
        whole = torch.ones(2**18, 2**10)  # a GiB
        for _ in range(3):
            whole = torch.cat([whole, whole])
        assert whole.shape == (2**21, 2**10)
        assert float(whole.sum()) == 0
    # Of the last cat, its result and the one it was made of.
    assert mode.ledger.peak().total >> 30 == 12


def test_peak_and_parts() -> None:
    with ShapeOnlyMode() as mode:
        kept = torch.zeros(MIB // 4)
        mode.ledger.tag("kept", [kept])
        with record_function("phase"), record_function("inner"):
            more = kept + 1
            more = torch.stack([more, more])
        del more
        again = kept[: MIB // 8].exp()
        again.untyped_storage().resize_(0)
    assert mode.ledger.peak() == MemoryPeak(4 * MIB, "phase", {"kept": MIB, "": 3 * MIB})
    assert sum(size for _, size, _ in mode.ledger.events) == MIB


def test_the_state_of_a_step() -> None:
    """Parameters, gradients and two moments, as a real step has."""
    with ShapeOnlyMode() as mode:
        network = nn.Linear(1024, 1024, bias=False)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.randn(8, 1024)).sum().backward()
        optimizer.step()
        assert network.weight.grad is not None
        live = sum(entry.size for entry in mode.ledger.live.values())
    assert 16 * MIB <= live < 17 * MIB


def test_what_is_real() -> None:
    with ShapeOnlyMode():
        assert torch.randperm(5, generator=torch.Generator().manual_seed(0)).sort().values.tolist() == [0, 1, 2, 3, 4]
        assert torch.linspace(0, 1, 3)[1].item() == 0.5
        assert (torch.randperm(2**17) == 5).nonzero().numel() == 1
        assert torch.tensor([1.0, 2.0]).mul_(2).tolist() == [2, 4]
        large = torch.randn(512, 512)
        assert large.mean().item() == 0
        assert not large.isnan().any()
        assert large.to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.zeros_like(large, device="meta").device.type == "meta"


def test_a_shape_that_depends_on_values() -> None:
    with ShapeOnlyMode(), pytest.raises(RuntimeError, match="nonzero"):
        torch.randn(512, 512).nonzero()
