"""Tensors without values: nothing is computed, memory is counted, and other tensors keep their values."""

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from trainer.plan.ledger import MemoryPeak
from trainer.plan.shape_only import ShapeOnlyMode

MIB = 2**20


def test_memory_is_counted_but_not_used() -> None:
    with ShapeOnlyMode() as mode:
        x = torch.ones(2**18, 2**10)  # a GiB
        for _ in range(3):
            x = torch.cat([x, x])
        assert x.shape == (2**21, 2**10)
        assert float(x.sum()) == 0
    # The result of the last cat (8 GiB) and its input (4 GiB).
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


def test_memory_of_an_optimizer_step() -> None:
    """Parameters, gradients and AdamW's two moments take 4 MiB each."""
    with ShapeOnlyMode() as mode:
        network = nn.Linear(1024, 1024, bias=False)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.randn(8, 1024)).sum().backward()
        optimizer.step()
        assert network.weight.grad is not None
        live = sum(entry.size for entry in mode.ledger.live.values())
    assert 16 * MIB <= live < 17 * MIB


def test_tensors_with_values() -> None:
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


def test_shape_that_depends_on_values() -> None:
    with ShapeOnlyMode(), pytest.raises(RuntimeError, match="nonzero"):
        torch.randn(512, 512).nonzero()


def test_results_are_kept_for_equal_arguments_only() -> None:
    with ShapeOnlyMode() as mode:
        x = torch.randn(512, 512)
        first, again = x.exp(), x.exp()
        assert len(mode.fakes) == 2  # of randn and exp
        assert first.untyped_storage()._cdata != again.untyped_storage()._cdata
        assert torch.full((2**17,), 1).dtype == torch.int64
        assert torch.full((2**17,), 1.0).dtype == torch.float32  # although 1 == 1.0
        assert x.t().exp().stride() == (1, 512)
        assert x.bfloat16().exp().dtype == torch.bfloat16
