"""FSDP2: parameters, gradients and the optimizer's state are sharded over the ranks, block by block.

A block's parameters are gathered before it runs and freed afterwards. Student and teacher are sharded alike, so the
moving average needs no communication.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from models.encoder import Encoder
from models.negatives.base import make_mesh
from trainer.engines.base import (
    EngineInputs,
    EngineSettings,
    TorchEngine,
    average_over_ranks,
    blocks,
    make_contiguous,
    named_networks,
    prepare_blocks,
)


class Settings(EngineSettings):
    """FSDP2."""

    kind: Literal["fsdp"] = Field("fsdp", description="FSDP2: parameters, gradients and optimizer state are sharded.")
    reshard_after_forward: bool = Field(
        True,
        description="Free the student's gathered parameters after forward; false keeps them until backward, which "
        "takes more memory and gathers once less.",
    )
    placement: Literal["sharded", "node"] = Field(
        "sharded", description="Shard over all ranks, or over the ranks of each node with one replica per node."
    )
    cpu_offload: bool = Field(
        False, description="Keep parameters and optimizer state in host memory and run the optimizer there."
    )

    @model_validator(mode="after")
    def _only_blocks_are_compiled(self) -> "Settings":
        if self.compile == "encoder":
            raise ValueError("compile: encoder does not go with FSDP2, which gathers block by block; need blocks")
        return self

    def build(self, inputs: EngineInputs) -> "FSDP":
        """See `EngineSettings.build`."""
        return FSDP(self, inputs)


class FSDP(TorchEngine):
    """See `trainer.engines.base.Engine`. Raises ValueError for a backbone without known blocks."""

    def __init__(self, settings: Settings, inputs: EngineInputs) -> None:
        student, teacher, rank_info = inputs.student, inputs.teacher, inputs.rank_info
        mesh = make_mesh(settings.placement, rank_info.device, rank_info.local_world_size)
        if settings.placement == "sharded":
            mesh = mesh["shard"]
        prepare_blocks(student, teacher, settings)
        for name, network in named_networks(student, teacher).items():
            reshard = settings.reshard_after_forward or name == "teacher"
            _shard(network, mesh, inputs.precision, reshard, settings.cpu_offload)
        super().__init__(inputs)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine.micro_batch`."""
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(last)
        return nullcontext()

    def student(self, views: list[Tensor]) -> Tensor:
        """See `Engine.student`."""
        queries_ND: Tensor = self.network(views)
        return queries_ND

    def average(self, replicated_grads: list[Tensor]) -> None:
        """Average the gradients of BatchNorm's parameters, which FSDP ignores, in one all-reduce."""
        average_over_ranks(replicated_grads)


def _shard(network: Encoder, mesh: DeviceMesh, precision: torch.dtype, reshard: bool, offload: bool) -> None:
    """Shard a network in place.

    Parameters are gathered and gradients computed in `precision`; gradients are averaged in fp32. BatchNorm's few
    parameters stay replicated, because they must have the type of its running statistics, fp32.
    """
    replicated = {p for module in network.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast casts inputs where that is needed
    if precision != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    make_contiguous(network)
    for module in [*blocks(network), network]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=offload_policy,
            ignored_params=replicated,
        )
