"""DeepSpeed ZeRO: stage 1 cuts the optimizer's state over the ranks, 2 the gradients too, 3 the parameters too.

Parameters stay fp32 and low precision is DeepSpeed's torch.autocast, which BatchNorm needs; convolutions and linear
layers then travel in the low precision. In stage 3 the teacher is cut like the student.
"""

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from models.encoder import Encoder
from models.teacher import ema_update
from trainer.config import Config, Optim
from trainer.distributed import RankInfo
from trainer.engines.base import LossScale, State, make_contiguous, named_networks, prepare_blocks
from trainer.engines.optim import Flat, Lars, make_optimizer


class ParamShard(NamedTuple):
    """What this rank has of one parameter, as ZeRO cuts them: a run of the flattened parameter, maybe empty.

    flat: a 1-D tensor that has pieces of several parameters; this one's begins at `offset`, is `length` long, and is
    the parameter from element `start` on. number: of the parameter among all that any rank's `flat` has a piece of.
    """

    flat: Tensor
    offset: int
    start: int
    length: int
    number: int

    def of(self, like_flat: Tensor) -> Tensor:
        """The piece in `flat` itself, or in another tensor that is laid out like it."""
        return like_flat.detach().narrow(0, self.offset, self.length)


class Zero:
    """See `trainer.engines.base.Engine`. Raises ValueError where engine.options contradict the configuration."""

    def __init__(
        self, student: Encoder, teacher: Encoder | None, config: Config, rank_info: RankInfo, precision: torch.dtype
    ) -> None:
        deepspeed = _import_deepspeed(rank_info.device)
        self.network, self.teacher, self.stage = student, teacher, config.engine.stage
        self.scale = LossScale() if precision == torch.float16 else None
        self.mesh = init_device_mesh(rank_info.device.type, (rank_info.world_size,))
        self.names = {p: name for name, p in student.named_parameters()}
        prepare_blocks(student, teacher, config.engine)
        settings = make_json(config, rank_info, precision)
        optimizer = make_optimizer(student, config.optim)
        for network in named_networks(student, teacher).values():
            make_contiguous(network)
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=copy.deepcopy(settings)
        )
        if self.stage == 3 and teacher:
            self.teacher_engine = deepspeed.initialize(model=teacher, config=copy.deepcopy(settings))[0]
        if self.scale:
            self.zero.torch_autocast_gradscaler = None  # it looks at one rank's gradients only
        self.pieces = self._pieces()
        self.memory = self.zero.optimizer.state
        for flat in {id(piece.flat): piece.flat for piece in self.pieces.values()}.values():
            self.memory[flat] = {key: torch.zeros_like(flat.detach()) for key in _slots(config.optim)}
            if config.optim.name == "adamw":
                self.memory[flat]["step"] = torch.tensor(0.0)
            if isinstance(optimizer, Lars):
                mine = [p for p in self.pieces.values() if p.flat is flat]
                parts = [(p.number, p.offset, p.length) for p in mine if p.length]
                optimizer.flat[flat] = Flat(len(mine), parts, self.mesh.get_group())

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self.engine.step()  # only counts the part

    def student(self, views: list[Tensor]) -> Tensor:
        queries_ND: Tensor = self.engine(views)
        return queries_ND

    def backward(self, loss: Tensor) -> None:
        if self.scale:
            self.zero.override_loss_scale(self.scale.value)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = math.inf if self.zero.overflow else float(self.zero._global_grad_norm)
        if self.scale:
            self.scale.update(math.isfinite(norm))
        return norm

    def update_teacher(self, momentum: float) -> None:
        if self.teacher:
            ema_update(self.teacher, self.network, momentum, lambda p: getattr(p, "ds_tensor", p))
            if (
                self.stage == 3 and self.mesh.device_type == "cuda"
            ):  # whose gathering is on a stream that waits for nothing
                torch.cuda.current_stream().synchronize()

    def weights(self) -> State:
        found: State = {}
        for name, network in named_networks(self.network, self.teacher).items():
            tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            found[name] = {key: self._whole_or_cut(tensors[key]) for key in network.state_dict()}
        return found

    def state(self) -> State:
        optimizer: dict[str, dict[str, Tensor]] = {}
        for p, piece in self.pieces.items():
            optimizer[self.names[p]] = {
                key: x if x.dim() == 0 else self._cut(piece.of(x), piece.start, _shape(p))
                for key, x in self.memory[piece.flat].items()
            }
        state: State = {**self.weights(), "optimizer": optimizer}
        return {**state, **({"loss_scale": {"state": self.scale.state}} if self.scale else {})}

    def load(self, state: State) -> None:
        for name, network in named_networks(self.network, self.teacher).items():
            for key, p in network.named_parameters():
                if hasattr(p, "ds_id"):
                    self._put(state[name][key], *self._held(p))
        for p, piece in self.pieces.items():
            held = self._held(p)[0] if self.stage == 3 else p.detach().flatten().narrow(0, piece.start, piece.length)
            piece.of(piece.flat).copy_(held)  # the optimizer's copy
            for key, x in self.memory[piece.flat].items():
                if x.dim():
                    self._put(state["optimizer"][self.names[p]][key], piece.of(x), piece.start)

    def _pieces(self) -> dict[nn.Parameter, ParamShard]:
        """Of every parameter of the student."""
        found: dict[nn.Parameter, ParamShard] = {}
        if self.stage == 3:
            for group in self.zero.fp16_groups:
                for number, p in enumerate(group):
                    flat, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
                    x, start = self._held(p)
                    found[p] = ParamShard(self.zero.fp32_partitioned_groups_flat[flat], offset, start, len(x), number)
            return found
        for group, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            for number, p in enumerate(group):
                found[p] = ParamShard(flat, 0, 0, 0, number)
                if (mapping := p._hp_mapping) is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    found[p] = ParamShard(flat, here.start, there.start, here.numel, number)
        return found

    def _held(self, p: Any) -> tuple[Tensor, int]:
        """This rank's part of a parameter that ZeRO-3 has cut, without padding, and where it begins."""
        start = min(p.ds_tensor.ds_numel * self.mesh.get_local_rank(), p.ds_numel)
        return p.ds_tensor.detach()[: p.ds_numel - start], start

    def _whole_or_cut(self, x: Tensor) -> Tensor:
        return self._cut(*self._held(x), _shape(x)) if hasattr(x, "ds_id") else x.detach()

    def _cut(self, x: Tensor, start: int, shape: torch.Size) -> DTensor:
        """The parameter of which ranks hold pieces x from `start` on, cut as DTensors are; a copy."""
        whole = torch.zeros(shape, device=self.mesh.device_type)
        whole.view(-1)[start : start + len(x)] = x
        dist.all_reduce(whole, group=self.mesh.get_group())
        rows = -(-shape[0] // self.mesh.size())
        first = self.mesh.get_local_rank() * rows
        part = whole[first : first + rows].clone()
        return DTensor.from_local(part, self.mesh, (Shard(0),), run_check=False, shape=shape, stride=whole.stride())

    def _put(self, saved: DTensor, x: Tensor, start: int) -> None:
        """The inverse of `_cut`: write into x."""
        x.copy_(saved.full_tensor().view(-1)[start : start + len(x)])


def make_json(config: Config, rank_info: RankInfo, precision: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration from ours and engine.options. Raises ValueError where these contradict ours."""
    engine, optim = config.engine, config.optim
    gpu = rank_info.device.type == "cuda"
    ours: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_clipping": optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,  # torch's SGD, and our LARS, which knows of flat parameters
        "torch_autocast": {"enabled": precision != torch.float32},
        "fp16": {"enabled": False},  # these turn BatchNorm's parameters into what its statistics are not
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": engine.stage},
    }
    if precision != torch.float32:
        ours["torch_autocast"]["dtype"] = str(precision).removeprefix("torch.")
    if engine.stage == 3:  # the moving average is on what is cut
        ours["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if engine.cpu_offload:
        ours["zero_force_ds_cpu_optimizer"] = False
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        if engine.stage == 3:
            ours["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    defaults = {
        "steps_per_print": 2**62,
        # DeepSpeed's own bucket, 5e8, takes 2 GB.
        "zero_optimization": {"overlap_comm": gpu, "reduce_bucket_size": 25_000_000},
    }
    for key, instead in (("optimizer", "optim"), ("scheduler", "optim")):
        if key in engine.options:
            raise ValueError(f"engine.options: {key} is not DeepSpeed's to choose; see {instead}.*")
    return merge(merge(defaults, engine.options, ""), ours, "engine.options: ")


def merge(base: dict[str, Any], top: dict[str, Any], refuse: str) -> dict[str, Any]:
    """Nested values with those of `top` over those of `base`; if `refuse`, ValueError where they differ."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = merge(below, value, refuse and f"{refuse}{key}.")
        elif refuse and key in merged and below != value:
            raise ValueError(f"{refuse}{key} is {below}, but the rest of the configuration makes it {value}")
        else:
            merged[key] = value
    return merged


def _slots(optim: Optim) -> tuple[str, ...]:
    """What the optimizer remembers of each element."""
    if optim.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optim.momentum else ()


def _shape(p: Any) -> torch.Size:
    return torch.Size(getattr(p, "ds_shape", p.shape))


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it asks for it without torchrun, too
    # DeepSpeed calls collectives by names that torch 2.14 deprecates, at every step.
    warnings.filterwarnings("ignore", ".*_tensor` is deprecated", FutureWarning, "torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":  # or it compiles an operation of its own, for minutes, that gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
