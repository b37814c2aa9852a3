"""Runs a few steps of rank 0 without values, to find the memory that a rank needs and the work that a step does.

Rank 0 of a fake process group of any size builds the training step and runs it with the code that trains, on tensors
without values (`trainer.plan.shape_only`). The bytes that are alive at the worst moment are the memory; the operators
and collectives of the last step are the work. The code runs on the CPU; to plan for a GPU it uses the GPU's precision,
kernels and optimizer. docs/plan.md lists what a GPU needs on top.
"""

import gc
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.normalize import normalize, normalize_fused
from kernels import chunked, ops
from kernels.triton.tiles import DIMS, best_splits, tiles
from trainer.build import build_encoder
from trainer.config import Config
from trainer.distributed import RankInfo
from trainer.engines import ddp
from trainer.engines.base import Engine
from trainer.engines.optim import local
from trainer.plan.cases import replaced
from trainer.plan.hardware import MEMORY_SIZES
from trainer.plan.ledger import MemoryLedger
from trainer.plan.shape_only import ShapeOnlyMode
from trainer.plan.trace import Event, StepTrace
from trainer.train_step import Rates, TrainStep

PARTS = ("networks", "optimizer", "gradients", "bank", "activations")
# A GPU's memory beside tensors: the CUDA context, buffers of NCCL and cuBLAS, and what the allocator cannot fill.
OVERHEAD_BYTES, OVERHEAD_SHARE = 2 * 2**30, 0.1
STEPS = 4  # DDP builds its buckets in the third step, ZeRO-3 learns its order in the second
MULTIPROCESSORS = 108  # of an A100; the Triton kernel `score` splits its work among them


class RankMemory(NamedTuple):
    """Bytes of one rank at its peak.

    Attributes:
        networks: Parameters and buffers of student and teacher.
        optimizer: The optimizer's state, and ZeRO's copies of the parameters.
        gradients: Gradients, and the buckets that reduce them.
        bank: The negatives.
        activations: Activations and all other tensors.
        phase: Phase of the peak, see `trainer.run.phases`; "building" before the first step.
    """

    networks: int
    optimizer: int
    gradients: int
    bank: int
    activations: int
    phase: str

    @property
    def peak(self) -> int:
        """All bytes."""
        return self.networks + self.optimizer + self.gradients + self.bank + self.activations

    def fits(self, size: int) -> bool:
        """Return whether a GPU with so many bytes can hold it, with the overhead."""
        return self.peak * (1 + OVERHEAD_SHARE) + OVERHEAD_BYTES <= size

    @property
    def fits_on(self) -> str:
        """The smallest of MEMORY_SIZES that can hold it, or ""."""
        return next((name for name, size in MEMORY_SIZES.items() if self.fits(size)), "")


class DryRun(NamedTuple):
    """The peak memory over all steps, and the operators and collectives of the last step in order."""

    memory: RankMemory
    events: list[Event]


def dry_run(configs: list[Config], world_size: int, ranks_per_node: int) -> list[DryRun]:
    """Run rank 0 of `world_size` ranks with each configuration.

    The process must have no process group, and must never have had one of another size.
    """
    logging.disable(logging.WARNING)  # DeepSpeed warns about settings that matter in a real training only
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        rank_info = RankInfo(torch.device("cpu"), 0, world_size, ranks_per_node)
        return [_dry_run(config, rank_info) for config in configs]
    finally:
        dist.destroy_process_group()
        logging.disable(logging.NOTSET)


def _dry_run(config: Config, rank_info: RankInfo) -> DryRun:
    gc.collect()  # the tensors of an earlier dry run take address space
    for_gpu, compress = config.run.device != "cpu", "none"
    if isinstance(config.engine, ddp.Settings):
        compress = config.engine.compress
        config = replaced(config, {"engine": {"compress": "none"}})
    trace = StepTrace(rank_info.local_world_size)
    with ShapeOnlyMode(_kernels(triton=for_gpu and config.model.dim in DIMS)) as mode:
        ledger = mode.ledger
        train_step = TrainStep(config, rank_info)
        method, engine = train_step.method, train_step.engine
        if for_gpu:
            _use_foreach(engine)
            train_step.normalize = partial(normalize_fused, dtype=train_step.precision)
        if isinstance(engine, ddp.DDP) and engine.wrapped is not None:
            # On a fake group DDP's own reduction in C++ has no result (torch 2.14).
            engine.wrapped.register_comm_hook(compress, _reduce_bucket)
        for network in filter(None, (method.student, method.teacher)):
            ledger.tag("networks", _shards([*network.parameters(), *network.buffers()]))
        if method.negatives:
            ledger.tag("bank", method.negatives.tensors())
            if method.negatives.learned and config.bank.init == "keys":
                _embed_first_keys(config)
        _tag_gradients(engine, method.student, ledger)
        for step in range(STEPS):
            with trace if step == STEPS - 1 else nullcontext():
                views = _batch(config, rank_info.world_size)
                ledger.tag("activations", views)
                train_step.step(views, step, Rates(0.1, 3.0, 0.99))
            ledger.tag("optimizer", _shards(_optimizer_tensors(engine)))
        ledger.tag_rest("gradients")  # all other tensors that outlive a step are buckets
    peak = ledger.peak()
    parts = {name: peak.parts.get(name, 0) for name in PARTS}
    parts["activations"] += peak.parts.get("", 0)
    return DryRun(RankMemory(**parts, phase=peak.phase or "building"), trace.events)


def _use_foreach(engine: Engine) -> None:
    """Let ZeRO's optimizer update all tensors at once, which it chooses by itself on a GPU."""
    optimizer: Any = getattr(engine, "zero", engine)
    for group in optimizer.optimizer.param_groups:
        if "foreach" in group and not group["fused"]:
            group["foreach"] = True


def _tag_gradients(engine: Engine, student: torch.nn.Module, ledger: MemoryLedger) -> None:
    """Tag gradients whenever the optimizer is about to use them."""
    original = engine.step

    def step(lr: float | Tensor, backbone_lr: float | Tensor | None = None) -> Tensor:
        ledger.tag("gradients", _shards(p.grad for p in student.parameters() if p.grad is not None))
        ledger.tag_rest("gradients", created_in="backward")
        return original(lr, backbone_lr)

    engine.step = step  # type: ignore[method-assign]


def _reduce_bucket(compress: str, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce a bucket as DDP does, or as its bf16_compress_hook does."""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16) if compress == "bf16" else gradients
    dist.all_reduce(sent)
    if sent is not gradients:
        gradients.copy_(sent)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradients)
    return future


def _batch(config: Config, world_size: int) -> list[Tensor]:
    """Return this rank's images of each view, as the loader makes them."""
    num_images = config.data.batch_size // world_size
    return [torch.empty(num_images, view.size, view.size, 3, dtype=torch.uint8) for view in config.data.views]


def _normalize(images: Tensor, config: Config) -> Tensor:
    return normalize(images, images.device) if config.run.device == "cpu" else normalize_fused(images)


@torch.no_grad()
def _embed_first_keys(config: Config) -> None:
    """Embed a chunk of images as `trainer.build.initialise_negatives` does, for a data set of at least 256 images."""
    encoder = build_encoder(config).to(memory_format=torch.channels_last)
    size = config.data.views[0].size
    images = torch.empty(256, size, size, 3, dtype=torch.uint8)
    encoder([_normalize(images, config)])


def _shards(tensors: Iterable[Any]) -> list[Tensor]:
    """Return this rank's shards of tensors, which FSDP2 or ZeRO-3 may have sharded."""
    return [local(getattr(x, "ds_tensor", x)) for x in tensors]


def _optimizer_tensors(engine: Engine) -> list[Tensor]:
    """Return the optimizer's state, and the parameters that it updates, which under ZeRO are flat copies."""
    owner: Any = engine
    state = owner.memory if hasattr(owner, "memory") else owner.optimizer.state
    return [x for p, slots in state.items() for x in (p, *slots.values()) if isinstance(x, Tensor)]


def _kernels(triton: bool) -> dict[str, Callable[..., Any]]:
    """Return the kernels' operators as Python code: `kernels.chunked`, or the allocations of the Triton kernels."""
    if triton:
        return {"adco::score": _triton_score, "adco::adversary_step": _triton_adversary_step}
    return {
        "adco::score": lambda *args: tuple(chunked.score(*args)),
        "adco::adversary_step": ops.chunked_adversary_step,
    }


def _triton_adversary_step(q_ND: Tensor, coef_N: Tensor, n_KD: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(q_ND.new_empty(len(n_KD), dtype=torch.float32) for _ in range(2))


def _triton_score(q_ND: Tensor, k_MD: Tensor, own_N: Tensor | None, n_KD: Tensor, *_: float) -> tuple[Tensor, ...]:
    """Allocate what `kernels.triton.score.score` does, without its launch: partial sums of S splits."""
    tile = tiles("score", 80, q_ND.shape[1], q_ND.dtype)
    row_tiles = -(-len(q_ND) // tile.rows)
    column_tiles = -(-len(k_MD) // tile.columns) + -(-len(n_KD) // tile.columns)
    per_split = -(-column_tiles // best_splits(row_tiles, column_tiles, MULTIPROCESSORS))
    splits = -(-column_tiles // per_split)
    z_SN, za_SN, top_SN = (q_ND.new_empty(splits, len(q_ND), dtype=torch.float32) for _ in range(3))
    o_SND = q_ND.new_empty(splits, *q_ND.shape, dtype=torch.float32)
    return z_SN.sum(0), o_SND.sum(0), za_SN.sum(0), top_SN.amax(0)
