"""DistributedDataParallel: every rank holds all networks, and gradients are averaged while backward runs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from models.compat import DDP_LOCAL_BUFFERS
from trainer.engines.base import EngineInputs, EngineSettings, TorchEngine, average_over_ranks, prepare_blocks


class Settings(EngineSettings):
    """DistributedDataParallel."""

    kind: Literal["ddp"] = Field("ddp", description="DistributedDataParallel: every rank holds all networks.")
    compress: Literal["none", "bf16"] = Field(
        "none", description="Type in which gradients are sent: none keeps fp32, bf16 halves the traffic."
    )
    cuda_graph: bool = Field(
        False,
        description="Capture the training step as one CUDA graph and replay it, so that Python no longer limits small "
        "batches. Where that is impossible, the log says why and training goes on without it.",
    )

    def build(self, inputs: EngineInputs) -> "DDP":
        """See `EngineSettings.build`."""
        return DDP(self, inputs)


class DDP(TorchEngine):
    """See `trainer.engines.base.Engine`. A single rank runs the network without a wrapper."""

    rates_on_device = True

    def __init__(self, settings: Settings, inputs: EngineInputs) -> None:
        student, rank_info = inputs.student, inputs.rank_info
        prepare_blocks(student, inputs.teacher, settings)
        super().__init__(inputs, teacher_dtype=inputs.precision)
        self.small = [p for m in student.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
        self.wrapped: DistributedDataParallel | None = None
        if rank_info.world_size > 1:
            self.settings, self.accumulate = settings, inputs.optim.accumulate
            self.wrapped = self._wrap()

    def _wrap(self) -> DistributedDataParallel:
        # DDP copies each gradient into a bucket by an operator of its own, and most are BatchNorm's small ones.
        small = set(self.small)
        names = [name for name, p in self.network.named_parameters() if p in small]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.network, names)
        wrapped = DistributedDataParallel(
            self.network,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            **DDP_LOCAL_BUFFERS,  # see `trainer.engines.finite.RunningStatistics`
            gradient_as_bucket_view=True,
            # A static graph also knows the parameters without gradient, but always synchronises.
            static_graph=self.accumulate == 1,
            find_unused_parameters=self.accumulate > 1,
        )
        if self.settings.compress == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def average(self, replicated_grads: list[Tensor]) -> None:
        """Average the gradients of BatchNorm's parameters, which DDP ignores, in one all-reduce."""
        if self.wrapped is not None:
            average_over_ranks([p.grad for p in self.small if p.grad is not None])

    def discard(self) -> None:
        """Forget a backward pass that an error has interrupted. Called by all ranks."""
        self.optimizer.zero_grad()
        if self.wrapped is not None:  # its reducer would wait for the rest of the gradients
            self.wrapped = self._wrap()

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine.micro_batch`."""
        return nullcontext() if last or self.wrapped is None else self.wrapped.no_sync()

    def student(self, views: list[Tensor]) -> Tensor:
        """See `Engine.student`."""
        queries_ND: Tensor = (self.wrapped or self.network)(views)
        return queries_ND
