"""DeepSpeed ZeRO: stage 1 shards the optimizer's state over the ranks, 2 the gradients too, 3 the parameters too.

Parameters stay fp32. Low precision is DeepSpeed's torch.autocast, which works with BatchNorm; gradients of convolutions
and linear layers are then sent in low precision. In stage 3 the teacher is sharded like the student.
"""

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from data.extras import optional_import
from models.compat import reduce_scatter_single
from models.negatives.base import make_mesh
from models.teacher import MovingAverage
from trainer.distributed import RankInfo
from trainer.engines.base import (
    EngineInputs,
    EngineSettings,
    State,
    make_contiguous,
    named_networks,
    prepare_blocks,
)
from trainer.engines.finite import LossScale
from trainer.engines.optim import FlatLayout, Lars, Optim, make_optimizer, set_learning_rates


class Settings(EngineSettings):
    """DeepSpeed ZeRO."""

    kind: Literal["deepspeed"] = Field("deepspeed", description="DeepSpeed ZeRO in stage 1, 2 or 3.")
    stage: Literal[1, 2, 3] = Field(
        3, description="ZeRO stage: 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too."
    )
    cpu_offload: bool = Field(
        False, description="Keep the optimizer's state, and in stage 3 the parameters, in host memory."
    )
    options: dict[str, Any] = Field(
        {}, description="More of DeepSpeed's own JSON settings; they must not contradict the rest of the configuration."
    )

    @model_validator(mode="after")
    def _stage_3_is_not_compiled(self) -> "Settings":
        if self.compile != "none" and self.stage == 3:
            raise ValueError("compile: ZeRO-3 hooks into every layer; need engine.kind=fsdp or another stage")
        return self

    def build(self, inputs: EngineInputs) -> "Zero":
        """See `EngineSettings.build`. Raises ValueError where `options` contradict the configuration."""
        return Zero(self, inputs)


class ParamShard(NamedTuple):
    """This rank's shard of one parameter: a range of the flattened parameter, possibly empty.

    Attributes:
        flat: 1-D tensor that packs shards of several parameters.
        offset: Where this shard begins in `flat`.
        start: The shard's first element in the flattened parameter.
        length: Number of elements.
        param: Index of the parameter among all that any rank packs into its `flat`.
    """

    flat: Tensor
    offset: int
    start: int
    length: int
    param: int

    def view_of(self, packed: Tensor) -> Tensor:
        """Return the shard as a view of `flat`, or of another tensor with the same layout."""
        return packed.detach().narrow(0, self.offset, self.length)


class Zero:
    """See `trainer.engines.base.Engine`."""

    rates_on_device = False

    def __init__(self, settings: Settings, inputs: EngineInputs) -> None:
        student, teacher, optim, batch_size, rank_info, precision = inputs
        deepspeed = _import_deepspeed(rank_info)
        self.network, self.teacher, self.stage = student, teacher, settings.stage
        self.device = rank_info.device
        self.scale = LossScale(rank_info.device) if precision == torch.float16 else None
        self.mesh = make_mesh("sharded", rank_info.device, rank_info.local_world_size)["shard"]
        self.names = {p: name for name, p in student.named_parameters()}
        if scalars := [name for p, name in self.names.items() if not p.dim()]:
            raise ValueError(f"engine.kind: deepspeed cannot shard scalar parameters, such as {scalars[0]}; need ddp")
        prepare_blocks(student, teacher, settings)
        json = make_json(settings, optim, batch_size, rank_info.device, precision)
        optimizer = make_optimizer(student, optim, fused=False)  # DeepSpeed itself skips steps
        for network in named_networks(student, teacher).values():
            make_contiguous(network)
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=copy.deepcopy(json)
        )
        if self.stage == 3 and teacher:
            self.teacher_engine = deepspeed.initialize(model=teacher, config=copy.deepcopy(json))[0]
        self.moving_average: MovingAverage | None = None
        if teacher:  # in stage 3, DeepSpeed gathers and frees the weights that a forward uses
            teacher_dtype = torch.float32 if self.stage == 3 else precision
            self.moving_average = MovingAverage(teacher, student, _local, teacher_dtype)
        if self.scale:
            self.zero.torch_autocast_gradscaler = None  # it checks the gradients of one rank only
        self.shards = self._find_shards()
        self.memory = self.zero.optimizer.state
        for flat in {id(shard.flat): shard.flat for shard in self.shards.values()}.values():
            self.memory[flat] = {key: torch.zeros_like(flat.detach()) for key in _slots(optim)}
            if optim.name == "adamw":
                self.memory[flat]["step"] = torch.tensor(0.0)
            if isinstance(optimizer, Lars):
                packed = [shard for shard in self.shards.values() if shard.flat is flat]
                held = [(shard.param, shard.offset, shard.length) for shard in packed if shard.length]
                optimizer.layouts[flat] = FlatLayout(len(packed), held, self.mesh.get_group())

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See `Engine.micro_batch`."""
        yield
        if not last:
            self.engine.step()  # before the last micro-batch, DeepSpeed's step only counts micro-batches

    def student(self, views: list[Tensor]) -> Tensor:
        """See `Engine.student`."""
        queries_ND: Tensor = self.engine(views)
        return queries_ND

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        if self.scale:
            self.zero.override_loss_scale(float(self.scale.value))
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float | Tensor, backbone_lr: float | Tensor | None = None) -> Tensor:
        """See `Engine.step`. DeepSpeed reads on the host whether the gradient is finite."""
        set_learning_rates(self.zero.param_groups, lr, backbone_lr)
        self.engine.step()
        norm = math.inf if self.zero.overflow else float(self.zero._global_grad_norm)
        self._wait()
        return torch.full((), norm, device=self.device)

    def update_teacher(self, momentum: float | Tensor, skip: Tensor | None = None) -> None:
        """See `Engine.update_teacher`."""
        if self.moving_average:
            self.moving_average.update(momentum, skip)
            self._wait()

    def _wait(self) -> None:
        """Wait for an update of parameters: ZeRO-3 gathers them on a stream that does not wait for it."""
        if self.stage == 3 and self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def weights(self) -> State:
        """See `Engine.weights`."""
        found: State = {}
        for name, network in named_networks(self.network, self.teacher).items():
            tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            found[name] = {key: self._tensor(tensors.get(key, x)) for key, x in network.state_dict().items()}
        return found

    def state(self) -> State:
        """See `Engine.state`."""
        optimizer: dict[str, dict[str, Tensor]] = {}
        for p, shard in self.shards.items():
            optimizer[self.names[p]] = {
                key: x if x.dim() == 0 else self._to_dtensor(shard.view_of(x), shard.start, _shape(p))
                for key, x in self.memory[shard.flat].items()
            }
        state: State = {**self.weights(), "optimizer": optimizer}
        return {**state, **({"loss_scale": {"state": self.scale.state}} if self.scale else {})}

    def load(self, state: State) -> None:
        """See `Engine.load`."""
        for name, network in named_networks(self.network, self.teacher).items():
            for key, p in network.named_parameters():
                if hasattr(p, "ds_id"):
                    self._from_dtensor(state[name][key], *self._held(p))
        for p, shard in self.shards.items():
            held = self._held(p)[0] if self.stage == 3 else p.detach().flatten().narrow(0, shard.start, shard.length)
            shard.view_of(shard.flat).copy_(held)  # the optimizer has its own copy of the parameters
            for key, x in self.memory[shard.flat].items():
                if x.dim():
                    self._from_dtensor(state["optimizer"][self.names[p]][key], shard.view_of(x), shard.start)
        if self.moving_average:
            self.moving_average.loaded()

    def _find_shards(self) -> dict[nn.Parameter, ParamShard]:
        """Return this rank's shard of each of the student's parameters."""
        found: dict[nn.Parameter, ParamShard] = {}
        if self.stage == 3:
            for group in self.zero.fp16_groups:
                for param, p in enumerate(group):
                    flat, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
                    x, start = self._held(p)
                    found[p] = ParamShard(self.zero.fp32_partitioned_groups_flat[flat], offset, start, len(x), param)
            return found
        for group, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            for param, p in enumerate(group):
                found[p] = ParamShard(flat, 0, 0, 0, param)
                if (mapping := p._hp_mapping) is not None:
                    packed, own = mapping.hp_fragment_address, mapping.lp_fragment_address
                    found[p] = ParamShard(flat, packed.start, own.start, packed.numel, param)
        return found

    def _held(self, p: Any) -> tuple[Tensor, int]:
        """Return this rank's shard of a ZeRO-3 parameter, without padding, and the shard's first element."""
        start = min(p.ds_tensor.ds_numel * self.mesh.get_local_rank(), p.ds_numel)
        return p.ds_tensor.detach()[: p.ds_numel - start], start

    def _tensor(self, x: Tensor) -> Tensor:
        """Return a parameter or buffer as a checkpoint holds it."""
        return self._to_dtensor(*self._held(x), _shape(x)) if hasattr(x, "ds_id") else x.detach()

    def _to_dtensor(self, shard: Tensor, start: int, shape: torch.Size) -> DTensor:
        """Return a copy of a parameter as a DTensor sharded by rows; `shard` holds its elements from `start` on."""
        rows, size = -(-shape[0] // self.mesh.size()), shape.numel() // shape[0]
        full = torch.zeros(self.mesh.size() * rows * size, device=self.mesh.device_type)
        full[start : start + len(shard)] = shard
        own = torch.empty(rows * size, device=self.mesh.device_type)
        reduce_scatter_single(own, full, group=self.mesh.get_group())  # each element comes from one rank
        first = min(self.mesh.get_local_rank() * rows, shape[0])
        held = min(rows, shape[0] - first)
        stride = torch.empty(shape, device="meta").stride()
        local = own[: held * size].view(held, *shape[1:])
        return DTensor.from_local(local, self.mesh, (Shard(0),), run_check=False, shape=shape, stride=stride)

    def _from_dtensor(self, saved: DTensor, shard: Tensor, start: int) -> None:
        """Write the parameter's elements from `start` on into `shard`, the inverse of `_to_dtensor`."""
        shard.copy_(saved.full_tensor().view(-1)[start : start + len(shard)])


def make_json(
    settings: Settings, optim: Optim, batch_size: int, device: torch.device, precision: torch.dtype
) -> dict[str, Any]:
    """Return DeepSpeed's own configuration. Raises ValueError where `settings.options` contradict ours."""
    gpu = device.type == "cuda"
    ours: dict[str, Any] = {
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_clipping": optim.clip or 0.0,
        "zero_allow_untested_optimizer": True,  # torch's SGD and our LARS are not on DeepSpeed's list
        "torch_autocast": {"enabled": precision != torch.float32},
        "fp16": {"enabled": False},  # fp16 and bf16 cast BatchNorm's parameters but not its running statistics
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": settings.stage},
    }
    if precision != torch.float32:
        ours["torch_autocast"]["dtype"] = str(precision).removeprefix("torch.")
    if settings.stage == 3:  # all parameters must be sharded, since the moving average works on shards
        ours["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if settings.cpu_offload:
        ours["zero_force_ds_cpu_optimizer"] = False
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        if settings.stage == 3:
            ours["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    defaults = {
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice per micro-batch
        # DeepSpeed's own bucket size, 5e8 elements, takes 2 GB.
        "zero_optimization": {"overlap_comm": gpu, "reduce_bucket_size": 25_000_000},
    }
    for key in ("optimizer", "scheduler", "train_micro_batch_size_per_gpu"):
        if key in settings.options:
            raise ValueError(f"engine.options: {key} is not DeepSpeed's to choose; see optim.* and data.batch_size")
    zero = settings.options.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if key in zero and key not in ours["zero_optimization"]:
            raise ValueError(f"engine.options: {key} needs engine.cpu_offload, and offload_param also engine.stage=3")
    return merge(merge(defaults, settings.options, ""), ours, "engine.options: ")


def merge(base: dict[str, Any], changes: dict[str, Any], refuse: str) -> dict[str, Any]:
    """Return nested values with `changes`. If `refuse` is a text, raise ValueError with it where values differ."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            merged[key] = merge(before, value, refuse and f"{refuse}{key}.")
        elif refuse and key in merged and before != value:
            raise ValueError(f"{refuse}{key} is {before}, but the rest of the configuration makes it {value}")
        else:
            merged[key] = value
    return merged


def _slots(optim: Optim) -> tuple[str, ...]:
    """Return the names of the tensors that the optimizer keeps for each parameter."""
    if optim.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optim.momentum else ()


def _shape(p: Any) -> torch.Size:
    """Return a parameter's full shape; ZeRO-3 leaves only empty tensors in the modules."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def _local(p: Any) -> Tensor:
    """Return this rank's shard of a ZeRO-3 parameter, with padding; any other tensor as it is."""
    shard: Tensor = getattr(p, "ds_tensor", p)
    return shard


def _import_deepspeed(rank_info: RankInfo) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", rank_info.device.type)
    os.environ.setdefault("LOCAL_RANK", str(rank_info.local_rank))  # DeepSpeed reads it even without torchrun
    # DeepSpeed calls collectives by names that torch 2.14 deprecates, at every step.
    warnings.filterwarnings("ignore", ".*_tensor` is deprecated", FutureWarning, "torch.distributed")
    with optional_import("deepspeed", "engine.kind=deepspeed"):
        import deepspeed  # takes seconds
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if rank_info.device.type == "cpu":  # without this, DeepSpeed compiles an extension for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
