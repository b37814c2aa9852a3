"""FSDP2: parameters, gradients and the optimizer's state are cut over the ranks, block by block.

A block's parameters are gathered when it runs and dropped afterwards. Student and teacher are cut alike, so the
moving average is local.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from models.encoder import Encoder
from models.teacher import ema_update
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.base import (
    LossScale,
    State,
    blocks,
    make_contiguous,
    named_networks,
    named_state,
    prepare_blocks,
    set_named_state,
    squared_norm,
    update,
)
from trainer.engines.optim import local, make_optimizer, shard_group


class FSDP:
    """See `trainer.engines.base.Engine`. Raises ValueError for a backbone without known blocks."""

    def __init__(
        self, student: Encoder, teacher: Encoder | None, config: Config, rank_info: RankInfo, precision: torch.dtype
    ) -> None:
        self.network, self.teacher, self.device, self.clip = student, teacher, rank_info.device, config.optim.clip
        self.scale = LossScale() if precision == torch.float16 else None
        engine = config.engine
        mesh = make_mesh(engine.placement, rank_info)
        prepare_blocks(student, teacher, engine)
        for name, network in named_networks(student, teacher).items():
            reshard = engine.reshard_after_forward or name == "teacher"
            _shard(network, mesh, precision, reshard, engine.cpu_offload)
        self.optimizer = make_optimizer(student, config.optim)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(last)
        yield

    def student(self, views: list[Tensor]) -> Tensor:
        queries_ND: Tensor = self.network(views)
        return queries_ND

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value if self.scale else loss).backward()

    def step(self, lr: float) -> float:
        scale = self.scale.value if self.scale else 1.0
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        sharded = [p for p in parameters if isinstance(p, DTensor)]
        whole_grads = [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
        _average(whole_grads)
        sharded_grads = [local(p.grad) for p in sharded if p.grad is not None]
        squares = squared_norm(sharded_grads, self.device)
        dist.all_reduce(squares, group=shard_group(sharded[0]))
        norm = math.sqrt(float(squares + squared_norm(whole_grads, self.device))) / scale
        # Offloaded, the former are on the host.
        update(self.optimizer, [sharded_grads, whole_grads], norm, self.clip, self.scale, lr)
        return norm

    def update_teacher(self, momentum: float) -> None:
        if self.teacher:
            ema_update(self.teacher, self.network, momentum, local)

    def weights(self) -> State:
        return {name: network.state_dict() for name, network in named_networks(self.network, self.teacher).items()}

    def state(self) -> State:
        return {**self.weights(), **named_state(self.network, self.optimizer, self.scale)}

    def load(self, state: State) -> None:
        set_named_state(self.network, self.optimizer, state)


def make_mesh(placement: str, rank_info: RankInfo) -> DeviceMesh:
    """All ranks in a row, or a row of ranks per node. Raises ValueError where nodes have different numbers of ranks."""
    if placement == "sharded":
        return init_device_mesh(rank_info.device.type, (rank_info.world_size,))
    if rank_info.world_size % rank_info.local_world_size:
        raise ValueError(
            "engine.placement: node needs the same number of ranks on each node, "
            f"got {rank_info.world_size} ranks with {rank_info.local_world_size} on this node"
        )
    shape = (rank_info.world_size // rank_info.local_world_size, rank_info.local_world_size)
    return init_device_mesh(rank_info.device.type, shape, mesh_dim_names=("replica", "shard"))


def _shard(network: Encoder, mesh: DeviceMesh, precision: torch.dtype, reshard: bool, offload: bool) -> None:
    """Cut a network in place.

    Parameters travel and gradients are computed in `precision`; gradients are averaged in fp32. BatchNorm needs its
    parameters in the type of its running statistics, fp32: they are few, and stay whole on every rank.
    """
    whole = {p for module in network.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast does that where it is needed
    if precision != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload_policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    make_contiguous(network)
    modules: list[nn.Module] = [*blocks(network), network]
    for module in modules:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=offload_policy,
            ignored_params=whole,
        )


def _average(grads: list[Tensor]) -> None:
    """Over all ranks, in place, in one go."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
