"""What a run will need before there is a cluster to run it on: the memory of a rank, under every engine.

Nothing is estimated by formula. Rank 0 of a fake process group of any size builds the game and its engine and plays
two steps, by the code that trains, on tensors without values (`trainer.hollow`); what is alive at the worst moment is
the prediction. That code runs on the CPU. For a GPU it is told to take the GPU's precision, kernels and optimizer; see
docs/plan.md for what comes on top there.
"""

import gc
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import kernels
from data.loader import normalize
from kernels.tiles import DIMS, best_splits, tiles
from models.method import Method
from trainer.build import autocast_type, make_encoder, make_engine, make_game
from trainer.config import Config, EngineSettings, check_world
from trainer.ddp import DDP
from trainer.distributed import Place
from trainer.engine import Engine
from trainer.hollow import Hollow
from trainer.optim import local
from trainer.step import Learner, Rates
from trainer.zero import merge

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
}
PARTS = ("networks", "optimizer", "gradients", "bank", "activations")
# What torch.cuda.mem_get_info calls total on them, rounded down.
GPUS = {"40 GB": 39 * 2**30, "80 GB": 79 * 2**30, "141 GB": 139 * 2**30}
# Beside the tensors: the CUDA context, NCCL's and cuBLAS's buffers; and blocks that the allocator cannot fill.
OVERHEAD_BYTES, OVERHEAD_SHARE = 2 * 2**30, 0.1
PROCESSORS = 108  # of an A100, by which Triton's `score` cuts its work


class Memory(NamedTuple):
    """Bytes of one rank at its worst moment.

    networks: student and teacher with their buffers. optimizer: what it remembers, and ZeRO's copies of the
    parameters. gradients: with the buckets in which they travel. activations: and all that lives for a moment.
    phase: of the worst moment; see `trainer.phases`, "building" before the first step.
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

    @property
    def fits(self) -> str:
        """The smallest of GPUS that takes it, "" if none does."""
        need = self.peak * (1 + OVERHEAD_SHARE) + OVERHEAD_BYTES
        return next((name for name, size in GPUS.items() if need <= size), "")


def name_of(engine: EngineSettings) -> str:
    """Of ENGINES."""
    return f"zero{engine.stage}" if engine.kind == "deepspeed" else engine.kind


def plan_memory(
    config: Config, ranks: list[int], ranks_per_node: int = 8, images_per_rank: int | None = None
) -> list[dict[str, Any]]:
    """`count_memory` for each engine and number of ranks; the configuration's own engine with all of its options.

    images_per_rank: data.batch_size is so many for each rank; None: it stays as it is, of all ranks together.
    Keys: engine, own (whether it is the configuration's), ranks, images (per rank), device, precision, peak, fits,
    and the fields of `Memory`. Raises ValueError where the batch or the bank does not fit a number of ranks, and for
    engine.cpu_offload, which takes from one memory to give to another.
    """
    if config.engine.cpu_offload:
        raise ValueError("plan memory: engine.cpu_offload moves memory to the host; need it off, both are one here")
    jobs, tasks = [], []
    # DeepSpeed keeps its group for the life of a process, so each number of ranks has its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm"])
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, max_tasks_per_child=1) as pool:
        for count in ranks:
            batch, node = (
                images_per_rank * count if images_per_rank else config.data.batch_size,
                min(ranks_per_node, count),
            )
            check_ranks(config, batch, count, node)
            settings = {engine: _with(config, engine, batch) for engine in ENGINES}
            jobs += [(engine, engine == name_of(config.engine), count, x) for engine, x in settings.items()]
            tasks.append(pool.submit(count_memory, list(settings.values()), count, node))
        memories = [
            memory for task in track(tasks, "counting", console=Console(stderr=True)) for memory in task.result()
        ]
    return [
        {
            "engine": engine,
            "own": own,
            "ranks": count,
            "images": settings.data.batch_size // count,
            "device": "cpu" if config.run.device == "cpu" else "gpu",
            "precision": settings.run.precision,
            **memory._asdict(),
            "peak": memory.peak,
            "fits": memory.fits,
        }
        for (engine, own, count, settings), memory in zip(jobs, memories, strict=True)
    ]


def count_memory(configs: list[Config], world: int, ranks_per_node: int) -> list[Memory]:
    """Of rank 0 of `world`, for each configuration. In a process that has no group, nor had one of another size."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        return [_count(config, Place(torch.device("cpu"), 0, world, ranks_per_node)) for config in configs]
    finally:
        dist.destroy_process_group()


def _count(config: Config, place: Place) -> Memory:
    """The game is built, the bank filled, two steps are taken."""
    gc.collect()  # what is left of another one takes no memory but address space
    gpu, compress = config.run.device != "cpu", config.engine.compress
    config = changed(config, {"engine": {"compress": "none"}})
    with Hollow(_kernels()) as hollow:
        game = make_game(config, place)
        engine = make_engine(game, config, place)
        if gpu:
            _as_on_gpu(game, engine, config)
        if isinstance(engine, DDP) and engine.wrapped is not None:
            # A fake group has no results for DDP's own reduction in C++ (torch 2.14).
            engine.wrapped.register_comm_hook(compress, _reduce_bucket)
        ledger = hollow.ledger
        for network in filter(None, (game.student, game.teacher)):
            ledger.tag("networks", _held([*network.parameters(), *network.buffers()]))
        if game.bank:
            ledger.tag("bank", [x for x in (game.bank.w_KD, game.bank.v_KD, game.bank.n_KD) if x is not None])
            if config.bank.init == "keys":
                _first_keys(config)
        if game.queue:
            ledger.tag("bank", [game.queue.n_KD])
        learner = Learner(game, engine, place, config.optim.accumulate, autocast_type(config, place.device))
        take = engine.step

        def step(lr: float) -> float:
            ledger.tag("gradients", _held(p.grad for p in game.student.parameters() if p.grad is not None))
            ledger.tag_rest("gradients", born="backward")
            return take(lr)

        engine.step = step  # type: ignore[method-assign]
        for number in range(2):
            images, views = _batch(config, place.world)
            ledger.tag("activations", [*images, *views])
            learner.step(views, number, Rates(0.1, 3.0, 0.99))
            ledger.tag("optimizer", _held(_remembered(engine)))
        ledger.tag_rest("gradients")  # what else stays from step to step are buckets
    peak = ledger.peak()
    parts = {name: peak.parts.get(name, 0) for name in PARTS}
    parts["activations"] += peak.parts.get("", 0)
    return Memory(**parts, phase=peak.phase or "building")


def report(results: list[dict[str, Any]], config: Config, out: Path | None) -> None:
    """Print what `plan_memory` gives and write it to `out` as JSON."""
    first = results[0]
    gpu = first["device"] == "gpu"
    kept = f", {config.bank.size:,} negatives ({config.bank.placement})" if config.method.negatives != "none" else ""
    table = Table(
        title=f"{config.model.backbone}, {config.method.name}, {first['precision']}{kept}: "
        f"GiB per rank on {'a GPU' if gpu else 'the CPU'}",
        box=None,
    )
    for column in ("ranks", "images a rank", "engine", *PARTS, "peak", "in"):
        table.add_column(column, justify="left" if column in ("engine", "in") else "right")
    if gpu:
        table.add_column("fits on")
    for before, row in zip([None, *results], results, strict=False):
        if before and before["ranks"] != row["ranks"]:
            table.add_section()
        table.add_row(
            f"{row['ranks']:,}",
            f"{row['images']:,}",
            row["engine"] + ("*" if row["own"] else ""),
            *(f"{row[part] / 2**30:.2f}" for part in (*PARTS, "peak")),
            row["phase"],
            *([row["fits"] or "none"] if gpu else []),
        )
    console = Console(width=max(140, Console().width))
    console.print(table)
    console.print("* the configuration's own engine")
    if gpu:
        console.print(
            f"fits: with {100 * OVERHEAD_SHARE:.0f} % and {OVERHEAD_BYTES / 2**30:.0f} GiB more, "
            "for what the allocator cannot fill and for CUDA, NCCL and cuBLAS; without DALI's memory"
        )
    if config.engine.compile:
        console.print("counted without engine.compile")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(result) for result in results)
        out.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def changed(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """The configuration with other values in some sections."""
    values = config.model_dump()
    return Config.model_validate({**values, **{name: {**values[name], **x} for name, x in changes.items()}})


def check_ranks(config: Config, batch: int, ranks: int, ranks_per_node: int) -> None:
    """Raise ValueError where a batch or the bank does not fit a number of ranks."""
    if ranks < 1:
        raise ValueError(f"plan: got {ranks} ranks, need at least 1")
    shards = {"replicated": 1, "sharded": ranks, "node": ranks_per_node}[config.bank.placement]
    try:
        check_world(changed(config, {"data": {"batch_size": batch}}), ranks, shards)
    except ValidationError as error:
        raise ValueError(f"plan: {ranks} ranks: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        hint = "; --images-per-rank N makes it N times the ranks" if "batch_size" in str(error) else ""
        raise ValueError(f"plan: {ranks} ranks: {error}{hint}") from None


def _with(config: Config, engine: str, batch: int) -> Config:
    """For another engine and batch, with the choices of `auto` made for the device that is meant."""
    kept = config.engine.model_dump() if engine == name_of(config.engine) else {}
    settings = {**kept, **ENGINES[engine], "compile": False}
    settings["activation_checkpointing"] = config.engine.activation_checkpointing
    changes = {"engine": settings, "data": {"batch_size": batch}}
    gpu = config.run.device != "cpu"
    if config.run.precision == "auto":
        changes["run"] = {"precision": "bf16" if gpu else "fp32"}
    if gpu and config.bank.kernels == "triton":  # which a CPU does not have
        changes["bank"] = {"kernels": "auto"}
    if gpu and engine.startswith("zero"):
        overlap = {"zero_optimization": {"overlap_comm": True}}
        settings["options"] = merge(overlap, settings.get("options", {}), "")
    return changed(config, changes)


def _as_on_gpu(game: Method, engine: Engine, config: Config) -> None:
    """What a GPU would have chosen by itself: Triton's kernels, and optimizers that take all tensors at once."""
    if config.bank.kernels == "auto":
        owners: list[Any] = [game, game.bank, game.queue]
        for owner in owners:
            if hasattr(owner, "kernels"):
                owner.kernels = "triton"
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


def _batch(config: Config, world: int) -> tuple[list[Tensor], list[Tensor]]:
    """The images of each view as the loader gives them, and as the network takes them."""
    each, sizes = config.data.batch_size // world, [view.size for view in config.data.views]
    images = [torch.empty(each, size, size, 3, dtype=torch.uint8) for size in sizes]
    return images, [normalize(x, torch.float32) for x in images]


@torch.no_grad()
def _first_keys(config: Config) -> None:
    """As `trainer.build.fill_bank` does for the untrained encoder's keys, of a data set of at least 256 images."""
    encoder = make_encoder(config).to(memory_format=torch.channels_last)
    size = config.data.views[0].size
    encoder([normalize(torch.empty(256, size, size, 3, dtype=torch.uint8), torch.float32)])


def _held(tensors: Iterable[Any]) -> list[Tensor]:
    """What this rank holds of them."""
    return [local(getattr(x, "ds_tensor", x)) for x in tensors]


def _remembered(engine: Engine) -> list[Tensor]:
    """The optimizer's state, and the flat parameters that it works on under ZeRO."""
    owner: Any = engine
    state = owner.memory if hasattr(owner, "memory") else owner.optimizer.state
    return [x for p, slots in state.items() for x in (p, *slots.values()) if isinstance(x, Tensor)]


def _kernels() -> dict[str, Callable[..., Any]]:
    """The kernels' operators, as the Python code that they are."""

    def score(name: str, q_ND: Tensor, k_MD: Tensor, own_N: Tensor | None, n_KD: Tensor, *temperatures: float) -> Any:
        if name == "triton":
            return _triton_score(q_ND, k_MD, n_KD)
        return tuple(kernels.implementation(name).score(q_ND, k_MD, own_N, n_KD, *temperatures))

    def adversary_step(
        name: str,
        q_ND: Tensor,
        coef_N: Tensor,
        n_KD: Tensor,
        w_KD: Tensor,
        v_KD: Tensor | None,
        temperature: float,
        lr: float,
        momentum: float,
        weight_decay: float,
        seed: int,
        first: int,
    ) -> Any:
        if name == "triton":
            return tuple(q_ND.new_empty(len(w_KD), dtype=torch.float32) for _ in range(2))
        step = kernels.implementation(name).adversary_step
        return tuple(
            step(
                q_ND,
                coef_N,
                n_KD,
                w_KD,
                v_KD,
                temperature=temperature,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                seed=seed,
                first=first,
            )
        )

    return {"adco::score": score, "adco::adversary_step": adversary_step}


def _triton_score(q_ND: Tensor, k_MD: Tensor, n_KD: Tensor) -> tuple[Tensor, ...]:
    """What `kernels.triton_score.score` allocates, without its launch: partial sums of S splits."""
    if q_ND.shape[1] not in DIMS:
        raise ValueError(f"model.dim: got {q_ND.shape[1]}, the triton kernels need one of {DIMS}")
    tile = tiles("score", 80, q_ND.shape[1], q_ND.dtype)
    row_tiles = -(-len(q_ND) // tile.rows)
    column_tiles = -(-len(k_MD) // tile.columns) + -(-len(n_KD) // tile.columns)
    per_split = -(-column_tiles // best_splits(row_tiles, column_tiles, PROCESSORS))
    splits = -(-column_tiles // per_split)
    z_SN, za_SN, top_SN = (q_ND.new_empty(splits, len(q_ND), dtype=torch.float32) for _ in range(3))
    o_SND = q_ND.new_empty(splits, *q_ND.shape, dtype=torch.float32)
    return z_SN.sum(0), o_SND.sum(0), za_SN.sum(0), top_SN.amax(0)
