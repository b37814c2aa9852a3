"""Saves a step whose loss or gradient was not finite, so that it can be repeated and examined.

replay/step-00001234/                       a checkpoint of the state before the step
replay/batch-00001234-rank-0.safetensors    the views, uint8 or normalised
replay/step-00001234.json                   images of each rank, seed, rates, and which values were not finite
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from models.encoder import Encoder
from trainer import distributed
from trainer.distributed import raise_on_all_ranks
from trainer.engines.base import named_networks
from trainer.engines.finite import NotFinite
from trainer.run import checkpoint
from trainer.run.directory import read_config
from trainer.run.files import write_json, write_safetensors
from trainer.run.metrics import set_up_logging
from trainer.train_step import Rates, TrainStep

_SHOWN = 8  # ranks, and images of each, in a message; the JSON file has all


class StepInputs(NamedTuple):
    """The arguments of `TrainStep.step` on one rank, and the indices [B] of its images in the data set."""

    views: list[Tensor]
    samples: Tensor
    seed: int
    rates: Rates


def dump(folder: Path, step: int, train_step: TrainStep, inputs: StepInputs, error: NotFinite) -> str:
    """Save what `replay` needs to repeat a failed step. Called by all ranks.

    Args:
        folder: The run directory.
        step: Number of the failed step.
        train_step: Its state is still that after `step` - 1 steps.
        inputs: This rank's inputs of the step.
        error: What was not finite.

    Returns:
        A message that names the images, and the command that repeats the step or the reason why it could not be saved.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    samples: list[list[int]] = [[]] * world_size
    dist.all_gather_object(samples, inputs.samples.tolist())
    failed_ranks = (error.ranks or range(world_size))[:_SHOWN]
    images = "; ".join(f"rank {r} had images {_shorten(samples[r])}" for r in failed_ranks)
    target, failure = folder / "replay", None
    if checkpoint.save(target, step, train_step.state(step - 1), keep=1):
        try:
            tensors = {f"view{i}": view.contiguous() for i, view in enumerate(inputs.views)}
            write_safetensors(_batch_file(target, step, rank), {**tensors, "samples": inputs.samples})
            if rank == 0:
                facts = {"step": step, "seed": inputs.seed, "rates": inputs.rates._asdict(), "error": str(error)}
                write_json(target / f"step-{step:08d}.json", {**facts, "samples": samples})
        except OSError as cause:
            failure = str(cause)
    else:
        failure = "the checkpoint could not be saved, see above"
    failures: list[str | None] = [None] * world_size
    dist.all_gather_object(failures, failure)
    if reasons := [f for f in failures if f]:
        return f"{images}; the step was not saved for a replay: {reasons[0]}"
    ranks = f", on {world_size} ranks like the run (torchrun)," if world_size > 1 else ""
    return f"{images}; python -m trainer replay {folder}{ranks} repeats this step"


def replay(run: Path) -> str:
    """Repeat the step that ended a run, on as many ranks, and find the modules that first produce non-finite values.

    Returns:
        The report, on rank 0; an empty text on the other ranks.

    Raises:
        ValueError: The run has no such step or had another number of ranks.
    """
    config = read_config(run)
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        folder = run / "replay"
        saved = sorted(folder.glob("step-*.json"))
        raise_on_all_ranks(None if saved else f"{run} has no step to replay: no loss or gradient was non-finite")
        facts = json.loads(saved[-1].read_text(encoding="utf-8"))
        step, ranks = facts["step"], len(facts["samples"])
        if ranks != rank_info.world_size:
            raise ValueError(f"{run}: step {step} ran on {ranks} ranks, got {rank_info.world_size}")
        # A compiled network has no hooks between its layers.
        eager = config.engine.model_copy(update={"compile": "none"})
        train_step = TrainStep(config.model_copy(update={"engine": eager}), rank_info)
        train_step.load(folder / f"step-{step:08d}")
        batch = load_file(_batch_file(folder, step, rank_info.rank), device=str(rank_info.device))
        views = [batch[f"view{i}"] for i in range(len(config.data.views))]
        views = [x.contiguous(memory_format=torch.channels_last) if x.is_floating_point() else x for x in views]
        findings = _watch(train_step.method.student, train_step.method.teacher)
        for i, view in enumerate(views):
            if count := int((~view.isfinite()).sum()):
                findings.append(f"{count} values of view {i}")
        try:
            train_step.step(views, facts["seed"], Rates(**facts["rates"])).check()
            outcome = "everything is finite this time"
        except NotFinite as error:
            outcome = str(error)
        return _report(facts, outcome, findings)


def _watch(student: Encoder, teacher: Encoder | None) -> list[str]:
    """Hook all leaf modules. Returns a list to which the first non-finite output and gradient are added in the step."""
    findings: list[str] = []
    found: set[str] = set()

    def check(kind: str, module: str, x: Tensor) -> None:
        if kind not in found and not bool(x.isfinite().all()):
            found.add(kind)
            findings.append(f"{kind} of {module}")

    def watch(network: str, name: str, module: nn.Module) -> None:
        label = f"{name} ({type(module).__name__})"

        def check_output(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                check(f"{network}'s output", label, output.detach())
                if output.requires_grad:
                    output.register_hook(lambda grad: check("gradient of the output", label, grad))

        module.register_forward_hook(check_output)

    for network, modules in named_networks(student, teacher).items():
        for name, module in modules.named_modules():
            if not any(module.children()):
                watch(network, name, module)
    return findings


def _report(facts: dict[str, Any], outcome: str, findings: list[str]) -> str:
    """Combine the findings of all ranks. Called by all ranks; returns the report on rank 0."""
    of_ranks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, findings)
    lines = [f"step {facts['step']} in the run: {facts['error']}", f"step {facts['step']} now: {outcome}"]
    for rank, (texts, samples) in enumerate(zip(of_ranks, facts["samples"], strict=True)):
        lines.append(f"rank {rank}, images {_shorten(samples)}")
        lines += [f"    not finite: {text}" for text in texts]
    return "\n".join(lines) if dist.get_rank() == 0 else ""


def _shorten(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:_SHOWN])) + (", …" if len(samples) > _SHOWN else "")


def _batch_file(folder: Path, step: int, rank: int) -> Path:
    return folder / f"batch-{step:08d}-rank-{rank}.safetensors"
