"""A step whose loss or gradient was not finite, kept so that it can be done again and looked at.

replay/step-00001234/                 a checkpoint of the state before that step
replay/batch-00001234-rank-0.safetensors  the views as the networks saw them
replay/step-00001234.json             samples of each rank, seed, rates, what was not finite
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.encoder import Encoder
from trainer import distributed
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.engines.base import NotFinite, named_networks
from trainer.run import checkpoint
from trainer.run.directory import read_config
from trainer.run.files import write_json
from trainer.run.metrics import set_up_logging
from trainer.train_step import Rates, TrainStep

_TOLD = 8  # ranks, and samples of each, that a message names; the file has all


def dump(
    folder: Path, step: int, train_step: TrainStep, views: list[Tensor], samples: Tensor, seed: int, rates: Rates,
    error: NotFinite,
) -> str:  # fmt: skip
    """Write what `replay` needs of the step that came to nothing; called by all ranks.

    Says which images it was, and what to do, or why nothing could be kept.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    of_ranks: list[list[int]] = [[]] * world_size
    dist.all_gather_object(of_ranks, samples.tolist())
    listed = "; ".join(f"rank {r} had samples {_some(of_ranks[r])}" for r in (error.ranks or range(world_size))[:_TOLD])
    kept, failure = folder / "replay", None
    if not checkpoint.save(kept, step, train_step.state(step - 1), keep=1):
        failure = "see above"
    else:
        try:
            tensors = {f"view{i}": view.contiguous() for i, view in enumerate(views)}
            save_file({**tensors, "samples": samples}, _batch(kept, step, rank))
            if rank == 0:
                facts = {"step": step, "seed": seed, "rates": rates._asdict(), "error": str(error), "samples": of_ranks}
                write_json(kept / f"step-{step:08d}.json", facts)
        except OSError as refusal:
            failure = str(refusal)
    failures: list[str | None] = [None] * world_size
    dist.all_gather_object(failures, failure)
    if reasons := [f for f in failures if f]:
        return f"{listed}; nothing kept to replay it: {reasons[0]}"
    on = f", on {world_size} ranks as the run (torchrun)," if world_size > 1 else ""
    return f"{listed}; python -m trainer replay {folder}{on} does this step again"


def _some(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:_TOLD])) + (", …" if len(samples) > _TOLD else "")


def replay(run: Path) -> str:
    """Do the step again that ended the run, on as many ranks; rank 0 gets what there is to say, others nothing.

    It names the modules that first give what is not finite.

    Raises ValueError if the run has no such step, or had another number of ranks.
    """
    config = read_config(run)
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        folder = run / "replay"
        kept = sorted(folder.glob("step-*.json"))
        raise_on_all_ranks(None if kept else f"{run}: no step to replay: none of this run was not finite")
        facts = json.loads(kept[-1].read_text(encoding="utf-8"))
        ranks = len(facts["samples"])
        raise_on_all_ranks(
            None
            if ranks == rank_info.world_size
            else f"{run}: step {facts['step']} was on {ranks} ranks, got {rank_info.world_size}"
        )
        train_step = TrainStep(config, rank_info)
        train_step.load(folder / f"step-{facts['step']:08d}")
        batch = load_file(_batch(folder, facts["step"], rank_info.rank), device=str(rank_info.device))
        views = [batch[f"view{i}"].contiguous(memory_format=torch.channels_last) for i in range(len(config.data.views))]
        found = _watch(train_step.method.student, train_step.method.teacher)
        found += [f"{n} values of view {i}" for i, n in _not_finite(views)]
        try:
            train_step.step(views, facts["seed"], Rates(**facts["rates"]))
            outcome = "all is finite this time"
        except NotFinite as error:
            outcome = str(error)
        return _tell(facts, outcome, found, rank_info)


def _watch(student: Encoder, teacher: Encoder | None) -> list[str]:
    """A list that will have the first module of each network whose output, or its gradient, is not finite."""
    found: list[str] = []
    seen: set[str] = set()

    def note(kind: str, what: str, x: Tensor) -> None:
        if kind not in seen and not bool(x.isfinite().all()):
            seen.add(kind)
            found.append(f"{kind} of {what}")

    def watch(network: str, name: str, module: nn.Module) -> None:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                note(f"{network}'s output", f"{name} ({type(module).__name__})", output.detach())
                if output.requires_grad:
                    what = f"{name} ({type(module).__name__})"
                    output.register_hook(lambda grad: note("gradient of the output", what, grad))

        module.register_forward_hook(look)

    for network, modules in named_networks(student, teacher).items():
        for name, module in modules.named_modules():
            if not any(module.children()):
                watch(network, name, module)
    return found


def _not_finite(views: list[Tensor]) -> list[tuple[int, int]]:
    counts = [(i, int((~view.isfinite()).sum())) for i, view in enumerate(views)]
    return [(i, n) for i, n in counts if n]


def _tell(facts: dict[str, Any], outcome: str, found: list[str], rank_info: RankInfo) -> str:
    of_ranks: list[list[str]] = [[]] * rank_info.world_size
    dist.all_gather_object(of_ranks, found)
    lines = [f"step {facts['step']} was: {facts['error']}", f"now: {outcome}"]
    for rank, (first, samples) in enumerate(zip(of_ranks, facts["samples"], strict=True)):
        lines.append(f"rank {rank}, samples {_some(samples)}")
        lines += [f"    not finite: {what}" for what in first]
    return "\n".join(lines) if rank_info.rank == 0 else ""


def _batch(folder: Path, step: int, rank: int) -> Path:
    return folder / f"batch-{step:08d}-rank-{rank}.safetensors"
