"""What a step of a rank needs and does, before there is a cluster to run it on: memory, operators, collectives.

Nothing is estimated by formula. Rank 0 of a fake process group of any size builds the game and its engine and plays
a few steps, by the code that trains, on tensors without values (`trainer.plan.shape_only`); what is alive at the worst
moment is the memory, and what the last step issues is the work. That code runs on the CPU. For a GPU it is told to
take the GPU's precision, kernels and optimizer; see docs/plan.md for what comes on top there.
"""

import gc
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch.profiler import record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.normalize import normalize, normalize_fused
from kernels import chunked
from kernels.triton.tiles import DIMS, best_splits, tiles
from trainer.build import build_encoder
from trainer.config import Config, check_world
from trainer.distributed import RankInfo
from trainer.engines import ddp, zero
from trainer.engines.base import Engine, EngineSettings
from trainer.engines.optim import local
from trainer.plan.hardware import GPUS, MEMORY_SIZES
from trainer.plan.shape_only import ShapeOnlyMode
from trainer.plan.trace import Event, StepTrace
from trainer.train_step import Rates, TrainStep

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
}
PARTS = ("networks", "optimizer", "gradients", "bank", "activations")
# Beside the tensors: the CUDA context, NCCL's and cuBLAS's buffers; and blocks that the allocator cannot fill.
OVERHEAD_BYTES, OVERHEAD_SHARE = 2 * 2**30, 0.1
STEPS = 4  # DDP finds its buckets in the third, ZeRO-3 its order in the second
PROCESSORS = 108  # of an A100, by which Triton's `score` cuts its work


class Memory(NamedTuple):
    """Bytes of one rank at its worst moment.

    networks: student and teacher with their buffers. optimizer: what it remembers, and ZeRO's copies of the
    parameters. gradients: with the buckets in which they travel. activations: and all that lives for a moment.
    phase: of the worst moment; see `trainer.run.phases`, "building" before the first step.
    """

    networks: int
    optimizer: int
    gradients: int
    bank: int
    activations: int
    phase: str

    @property
    def peak(self) -> int:
        return self.networks + self.optimizer + self.gradients + self.bank + self.activations

    def fits(self, size: int) -> bool:
        """Into a GPU of so many bytes."""
        return self.peak * (1 + OVERHEAD_SHARE) + OVERHEAD_BYTES <= size

    @property
    def fits_on(self) -> str:
        """The smallest of MEMORY_SIZES that takes it, "" if none does."""
        return next((name for name, size in MEMORY_SIZES.items() if self.fits(size)), "")


class Counted(NamedTuple):
    """events: of the last step, in order: none of what only first steps do."""

    memory: Memory
    events: list[Event]


def name_of(engine: EngineSettings) -> str:
    """Of ENGINES."""
    return f"zero{engine.stage}" if isinstance(engine, zero.Settings) else engine.kind


def count(configs: list[Config], world_size: int, ranks_per_node: int) -> list[Counted]:
    """Of rank 0 of `world`, for each configuration. In a process that has no group, nor had one of another size."""
    logging.disable(logging.WARNING)  # DeepSpeed's, about what is played and not trained
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        return [_count(config, RankInfo(torch.device("cpu"), 0, world_size, ranks_per_node)) for config in configs]
    finally:
        dist.destroy_process_group()
        logging.disable(logging.NOTSET)


def _count(config: Config, rank_info: RankInfo) -> Counted:
    """The game is built, the bank filled, STEPS steps are taken."""
    gc.collect()  # what is left of another one takes no memory but address space
    gpu, compress = config.run.device != "cpu", "none"
    if isinstance(config.engine, ddp.Settings):
        compress = config.engine.compress
        config = changed(config, {"engine": {"compress": "none"}})
    trace = StepTrace(rank_info.local_world_size)
    with ShapeOnlyMode(_kernels(triton=gpu and config.model.dim in DIMS)) as mode:
        train_step = TrainStep(config, rank_info)
        method, engine = train_step.method, train_step.engine
        if gpu:
            _as_on_gpu(engine)
        if isinstance(engine, ddp.DDP) and engine.wrapped is not None:
            # A fake group has no results for DDP's own reduction in C++ (torch 2.14).
            engine.wrapped.register_comm_hook(compress, _reduce_bucket)
        ledger = mode.ledger
        for network in filter(None, (method.student, method.teacher)):
            ledger.tag("networks", _held([*network.parameters(), *network.buffers()]))
        if method.negatives:
            ledger.tag("bank", method.negatives.tensors())
            if method.negatives.learned and config.bank.init == "keys":
                _first_keys(config)
        take = engine.step

        def step(lr: float) -> float:
            ledger.tag("gradients", _held(p.grad for p in method.student.parameters() if p.grad is not None))
            ledger.tag_rest("gradients", created_in="backward")
            return take(lr)

        engine.step = step  # type: ignore[method-assign]
        for number in range(STEPS):
            with trace if number == STEPS - 1 else nullcontext():
                with record_function("normalize"):
                    images, views = _batch(config, rank_info.world_size)
                ledger.tag("activations", [*images, *views])
                train_step.step(views, number, Rates(0.1, 3.0, 0.99))
            ledger.tag("optimizer", _held(_remembered(engine)))
        ledger.tag_rest("gradients")  # what else stays from step to step are buckets
    peak = ledger.peak()
    parts = {name: peak.parts.get(name, 0) for name in PARTS}
    parts["activations"] += peak.parts.get("", 0)
    return Counted(Memory(**parts, phase=peak.phase or "building"), trace.events)


def changed(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """The configuration with other values in some sections."""
    values = config.model_dump()
    return Config.model_validate({**values, **{name: {**values[name], **x} for name, x in changes.items()}})


def check_ranks(config: Config, batch: int, ranks: int, ranks_per_node: int) -> None:
    """Raise ValueError where a batch or the bank does not fit a number of ranks."""
    if ranks < 1:
        raise ValueError(f"plan: got {ranks} ranks, need at least 1")
    try:
        check_world(changed(config, {"data": {"batch_size": batch}}), ranks, ranks_per_node)
    except ValidationError as error:
        raise ValueError(f"plan: {ranks} ranks: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        hint = "; --images-per-gpu N makes it N times the GPUs" if "batch_size" in str(error) else ""
        raise ValueError(f"plan: {ranks} ranks: {error}{hint}") from None


def with_engine(config: Config, engine: str, placement: str, batch: int, gpu: str) -> Config:
    """Return the configuration for another engine, placement of the bank and batch, as it would run on a GPU.

    Choices of `auto` are made for the GPU, a key of GPUS. Compilation is off: a dry run cannot compile.
    """
    kept = config.engine.model_dump() if engine == name_of(config.engine) else {}
    shared = {"activation_checkpointing": config.engine.activation_checkpointing, "compile": False}
    values = changed(config, {"data": {"batch_size": batch}, "bank": {"placement": placement}}).model_dump()
    values["engine"] = settings = {**kept, **ENGINES[engine], **shared}
    on_gpu = config.run.device != "cpu"
    if config.run.precision == "auto":
        values["run"]["precision"] = "bf16" if on_gpu and "bfloat16" in GPUS[gpu].flops else "fp32"
    if on_gpu and engine.startswith("zero"):
        overlap = {"zero_optimization": {"overlap_comm": True}}
        settings["options"] = zero.merge(overlap, settings.get("options", {}), "")
    return Config.model_validate(values)


def _as_on_gpu(engine: Engine) -> None:
    """Choose what a GPU would choose by itself: optimizers that process all tensors at once."""
    optimizer: Any = getattr(engine, "zero", engine)
    for group in optimizer.optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = True


def _reduce_bucket(compress: str, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """As DDP's own reduction, or its bf16_compress_hook."""
    whole = bucket.buffer()
    sent = whole.to(torch.bfloat16) if compress == "bf16" else whole
    dist.all_reduce(sent)
    if sent is not whole:
        whole.copy_(sent)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(whole)
    return future


def _batch(config: Config, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The images of each view as the loader gives them, and as the network takes them."""
    each, sizes = config.data.batch_size // world_size, [view.size for view in config.data.views]
    images = [torch.empty(each, size, size, 3, dtype=torch.uint8) for size in sizes]
    return images, [_normalize(x, config) for x in images]


def _normalize(images: Tensor, config: Config) -> Tensor:
    return normalize(images, images.device) if config.run.device == "cpu" else normalize_fused(images)


@torch.no_grad()
def _first_keys(config: Config) -> None:
    """Embed a chunk of images as `trainer.build.initialise_negatives` does, for a data set of at least 256 images."""
    encoder = build_encoder(config).to(memory_format=torch.channels_last)
    size = config.data.views[0].size
    images = torch.empty(256, size, size, 3, dtype=torch.uint8)
    encoder([_normalize(images, config)])


def _held(tensors: Iterable[Any]) -> list[Tensor]:
    """What this rank holds of them."""
    return [local(getattr(x, "ds_tensor", x)) for x in tensors]


def _remembered(engine: Engine) -> list[Tensor]:
    """The optimizer's state, and the flat parameters that it works on under ZeRO."""
    owner: Any = engine
    state = owner.memory if hasattr(owner, "memory") else owner.optimizer.state
    return [x for p, slots in state.items() for x in (p, *slots.values()) if isinstance(x, Tensor)]


def _kernels(triton: bool) -> dict[str, Callable[..., Any]]:
    """Return the kernels' operators as Python code: `kernels.chunked`, or what the Triton kernels allocate."""
    if triton:
        return {"adco::score": _triton_score, "adco::adversary_step": _triton_adversary_step}
    return {
        "adco::score": lambda *args: tuple(chunked.score(*args)),
        "adco::adversary_step": lambda *args: tuple(chunked.adversary_step(*args)),
    }


def _triton_adversary_step(q_ND: Tensor, coef_N: Tensor, n_KD: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(q_ND.new_empty(len(n_KD), dtype=torch.float32) for _ in range(2))


def _triton_score(q_ND: Tensor, k_MD: Tensor, own_N: Tensor | None, n_KD: Tensor, *_: float) -> tuple[Tensor, ...]:
    """Allocate what `kernels.triton.score.score` does, without its launch: partial sums of S splits."""
    tile = tiles("score", 80, q_ND.shape[1], q_ND.dtype)
    row_tiles = -(-len(q_ND) // tile.rows)
    column_tiles = -(-len(k_MD) // tile.columns) + -(-len(n_KD) // tile.columns)
    per_split = -(-column_tiles // best_splits(row_tiles, column_tiles, PROCESSORS))
    splits = -(-column_tiles // per_split)
    z_SN, za_SN, top_SN = (q_ND.new_empty(splits, len(q_ND), dtype=torch.float32) for _ in range(3))
    o_SND = q_ND.new_empty(splits, *q_ND.shape, dtype=torch.float32)
    return z_SN.sum(0), o_SND.sum(0), za_SN.sum(0), top_SN.amax(0)
