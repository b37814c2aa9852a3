"""DistributedDataParallel: every rank has all of the networks, gradients are averaged while backward runs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from models.encoder import Encoder
from models.teacher import ema_update
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines.base import (
    LossScale,
    State,
    named_networks,
    named_state,
    prepare_blocks,
    set_named_state,
    squared_norm,
    update,
)
from trainer.engines.optim import make_optimizer


class DDP:
    """See `trainer.engines.base.Engine`. One rank alone has no wrapper."""

    def __init__(
        self, student: Encoder, teacher: Encoder | None, config: Config, rank_info: RankInfo, precision: torch.dtype
    ) -> None:
        self.plain, self.teacher, self.device, self.clip = student, teacher, rank_info.device, config.optim.clip
        self.scale = LossScale() if precision == torch.float16 else None
        prepare_blocks(student, teacher, config.engine)
        self.optimizer = make_optimizer(student, config.optim)
        self.wrapped: DistributedDataParallel | None = None
        if rank_info.world_size > 1:
            self.wrapped = DistributedDataParallel(
                student,
                device_ids=[rank_info.device.index] if rank_info.device.type == "cuda" else None,
                forward_sync_buffers=False,  # BatchNorm's running statistics are averaged when they are needed
                gradient_as_bucket_view=True,
                static_graph=config.optim.accumulate == 1,  # it may not change between parts that reduce or not
            )
            if config.engine.compress == "bf16":
                self.wrapped.register_comm_hook(None, bf16_compress_hook)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with nullcontext() if last or self.wrapped is None else self.wrapped.no_sync():
            yield

    def student(self, views: list[Tensor]) -> Tensor:
        queries_ND: Tensor = (self.wrapped or self.plain)(views)
        return queries_ND

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value if self.scale else loss).backward()

    def step(self, lr: float) -> float:
        scale = self.scale.value if self.scale else 1.0
        grads = [p.grad for p in self.plain.parameters() if p.grad is not None]
        norm = math.sqrt(float(squared_norm(grads, self.device))) / scale
        update(self.optimizer, [grads], norm, self.clip, self.scale, lr)
        return norm

    def update_teacher(self, momentum: float) -> None:
        if self.teacher:
            ema_update(self.teacher, self.plain, momentum)

    def weights(self) -> State:
        return {name: network.state_dict() for name, network in named_networks(self.plain, self.teacher).items()}

    def state(self) -> State:
        return {**self.weights(), **named_state(self.plain, self.optimizer, self.scale)}

    def load(self, state: State) -> None:
        set_named_state(self.plain, self.optimizer, state)
