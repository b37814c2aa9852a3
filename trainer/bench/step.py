"""The cost of the method: a training step against the bare work of its networks, and the share of each phase."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.bench.harness import interleave, medians, print_table, seconds, write_result
from trainer.bench.synthetic import build_step, describe, frozen_rates, random_views, title, warm_up_steps
from trainer.config import Config
from trainer.train_step import TrainStep

WARMUP = 3  # turns that are not counted: they choose algorithms and allocate memory


def run(config: Config, repeats: int) -> dict[str, Any]:
    """Time both steps in `repeats` alternating turns on one batch of random images.

    Returns a dictionary: step_seconds of `TrainStep.step`; bare_seconds of normalising, the forward passes of student
    and teacher, the backward pass of a sum, the optimizer's step and the moving average; overhead, their ratio minus
    one; phases, the share of each phase in the training step.
    """
    with distributed.process_group(config.run.device) as rank_info:
        train_step, bare_step = (build_step(config, rank_info) for _ in range(2))
        views, rates = random_views(config, rank_info), frozen_rates(config)
        sides = {
            "step": lambda: seconds(lambda: train_step.step(views, 0, rates), rank_info.device),
            "bare": lambda: seconds(lambda: _take_bare_step(bare_step, views, config), rank_info.device),
        }
        interleave(sides, warm_up_steps(train_step, WARMUP))
        train_step.phases.pop()
        times = medians(interleave(sides, repeats))
        phases = train_step.phases.pop()
        return {
            **describe(config, rank_info),
            "repeats": repeats,
            "step_seconds": times["step"],
            "bare_seconds": times["bare"],
            "overhead": times["step"] / times["bare"] - 1,
            "phases": {name: value / sum(phases.values()) for name, value in phases.items()},
        }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as a table and write it to `out` as JSON."""
    print_table(
        title(result),
        ("", ""),
        [
            ("training step", f"{1e3 * result['step_seconds']:.1f} ms"),
            ("bare networks", f"{1e3 * result['bare_seconds']:.1f} ms"),
            ("overhead", f"{100 * result['overhead']:+.1f} %"),
            (),
            *((name, f"{100 * share:.1f} %") for name, share in result["phases"].items()),
        ],
    )
    write_result(out, result)


def _take_bare_step(train_step: TrainStep, views: list[Tensor], config: Config) -> None:
    method, engine, accumulate = train_step.method, train_step.engine, train_step.accumulate
    precision = train_step.precision
    for i, micro_batch in enumerate(zip(*(view.chunk(accumulate) for view in views), strict=True)):
        inputs = [train_step.normalize(view) for view in micro_batch]
        with engine.micro_batch(last=i == accumulate - 1):
            with torch.autocast(views[0].device.type, precision, enabled=precision != torch.float32):
                if method.teacher:
                    with torch.no_grad():
                        for j in method.key_views:
                            method.teacher([inputs[j]])
                output = engine.student([inputs[j] for j in method.query_views(len(inputs))])
            engine.backward(output.sum())
    engine.step(0.0)
    engine.update_teacher(config.method.teacher_momentum)
