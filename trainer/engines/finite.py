"""Steps that are not finite: the device undoes them at once, and the host learns of them later.

The host does not wait for the device within a step. Whether loss and gradient are finite is a number on the device, by
which everything that a step changes is masked. `FiniteCheck` copies it to the host while later steps run. These must
change nothing either, so that the failed step can be repeated: `trainer.train_step` makes their losses NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NotFinite(ValueError):
    """The loss of some ranks, or the gradient, is not finite; nothing was updated."""

    def __init__(self, ranks: list[int], norm: float) -> None:
        """Describes the failed step.

        Args:
            ranks: Ranks whose loss is not finite; empty if only the gradient overflowed.
            norm: Norm of the gradient over all ranks.
        """
        where = f"the loss on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}, " if ranks else ""
        super().__init__(f"not finite: {where}gradient norm {norm}; nothing was updated")
        self.ranks, self.norm = ranks, norm

    def __reduce__(self) -> tuple[type["NotFinite"], tuple[list[int], float]]:
        """Make the error picklable: processes of the planner and of tests pass errors on."""
        return NotFinite, (self.ranks, self.norm)


def not_finite(x: Tensor) -> Tensor:
    """Return whether a scalar is not finite, bool, in half the operators of ~x.isfinite()."""
    return (x - x) != 0  # NaN for an infinity, too


class FiniteCheck:
    """The verdict on a step, on its way from the device to the host.

    Args:
        values: [3] on the device: norm of the gradient over all ranks; whether the step failed, equal on all ranks;
            whether the loss of this rank is not finite.
    """

    def __init__(self, values: Tensor) -> None:
        self.device, self.copied = values.device, None
        self.values = values.to("cpu", non_blocking=True)  # into pinned memory
        if values.is_cuda:
            self.copied = torch.cuda.Event(blocking=True)
            self.copied.record()

    def __call__(self) -> None:
        """Wait until the device has computed the step. Called by all ranks, after the same number of steps.

        Raises:
            NotFinite: The step failed; on all ranks.
        """
        if self.copied is not None:
            self.copied.synchronize()
        norm, failed, own_failed = self.values.tolist()
        if failed:
            ranks = [torch.zeros((), device=self.device) for _ in range(dist.get_world_size())]
            dist.all_gather(ranks, torch.full((), own_failed, device=self.device))
            raise NotFinite([rank for rank, flag in enumerate(ranks) if flag], norm)


class StepResult(NamedTuple):
    """Result of a step that the device may still be computing.

    Attributes:
        metrics: This rank's metrics, scalars on the device.
        check: Waits for the device and raises NotFinite, on all ranks, if loss or gradient were not finite.
    """

    metrics: dict[str, Tensor]
    check: Callable[[], None]


class LossScale:
    """Loss scale for fp16 (arXiv 1710.03740): halved when gradients overflow, doubled after 2,000 steps without that.

    The constants are those of torch.amp.GradScaler, which is not used because it checks the gradients of one rank only,
    and under ZeRO ranks hold different gradients.
    """

    def __init__(self, device: torch.device, value: float = 65536.0) -> None:
        # The scale, and the number of steps since it last changed.
        self.state = torch.tensor([value, 0.0], device=device)

    @property
    def value(self) -> Tensor:
        """The current scale, a scalar on the device that shares memory with the state."""
        return self.state[0]

    def update(self, overflow: Tensor, failed: Tensor | None = None) -> None:
        """Adjust the scale after a step.

        Args:
            overflow: Whether the gradient overflowed, bool scalar.
            failed: Where true, the scale stays as it is, because no smaller scale can help; bool scalar.
        """
        scale, steps = self.state.unbind()
        grows = steps + 1 == 2000
        new_scale = torch.where(overflow, scale / 2, torch.where(grows, scale * 2, scale))
        updated = torch.stack([new_scale, torch.where(overflow | grows, 0.0, steps + 1)])
        self.state.copy_(updated if failed is None else torch.where(failed, self.state, updated))


class RunningStatistics:
    """The running statistics of the BatchNorms of student and teacher, which a step changes before its loss is known.

    The teacher's are among them: their momentum is 0, but 0 times NaN is NaN.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, local: bool) -> None:
        """Keeps the buffers of both networks; `local` if each rank's student sees only a part of the global batch."""
        own = _statistics(student)
        buffers = own + (_statistics(teacher) if teacher is not None else [])
        self.groups = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype: None for b in buffers}]
        # How many numbers at the start of each group are averaged: the student's, which the teacher's follow.
        self.averaged = [
            sum(len(b) for b in own if b.dtype == group[0].dtype and b.is_floating_point()) if local else 0
            for group in self.groups
        ]
        self.saved: list[Tensor] = []
        self.current: list[Tensor] = []
        self.works: list[dist.Work] = []

    @torch.no_grad()
    def save(self) -> None:
        """Keep a copy of the present values."""
        self.saved = [torch.cat(buffers) for buffers in self.groups]

    @torch.no_grad()
    def average(self) -> None:
        """Begin to replace the student's statistics by their mean over ranks. Collective.

        If only checkpoints did this, its rounding would distinguish a run that was stopped from one that was not.
        """
        self.current = [torch.cat(buffers) for buffers in self.groups]
        for current, count in zip(self.current, self.averaged, strict=True):
            if count:
                own = current[:count].div_(dist.get_world_size())
                self.works.append(dist.all_reduce(own, async_op=True))

    @torch.no_grad()
    def finish(self, failed: Tensor) -> None:
        """End what `average` began, or return to the copy of `save` where `failed`, a bool scalar, is true."""
        for work in self.works:
            work.wait()
        self.works.clear()
        for buffers, saved, current in zip(self.groups, self.saved, self.current, strict=True):
            kept = torch.where(failed, saved, current)
            torch._foreach_copy_(buffers, kept.split([len(b) for b in buffers]))


def _statistics(network: nn.Module) -> list[Tensor]:
    """Return the buffers of all BatchNorms as vectors that share their memory."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return [buffer.view(-1) for norm in norms for buffer in norm.buffers()]
