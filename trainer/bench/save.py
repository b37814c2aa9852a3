"""The cost of a checkpoint: how long training waits for it, and how much slower the steps are while it is written."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import distributed
from trainer.bench.harness import print_table, seconds, write_result
from trainer.bench.synthetic import build_step, describe, frozen_rates, random_views, title, warm_up_steps
from trainer.config import Config
from trainer.run import checkpoint

WARMUP = 3  # steps that are not counted: they choose algorithms and allocate memory


def run(config: Config, folder: Path | None, saves: int) -> dict[str, Any]:
    """Alternate between steps during a save and as many steps without one.

    Args:
        config: The configuration.
        folder: Where the checkpoints are written and deleted again; None for the system's temporary folder.
        saves: Number of checkpoints.

    Returns:
        A dictionary of medians: copy_seconds that training waits for a save, save_seconds until all is written,
        beside_seconds of a step during a save, step_seconds of a step without one, and the ratio of the two.

    Raises:
        ValueError: The checkpoint cannot be written, or takes less time than a step.
    """
    with (
        distributed.process_group(config.run.device) as rank_info,
        tempfile.TemporaryDirectory(dir=folder) as temporary,
    ):
        folders: list[Any] = [temporary]
        dist.broadcast_object_list(folders)
        checkpoints = Path(folders[0]) / "checkpoints"
        train_step = build_step(config, rank_info)
        views, rates = random_views(config, rank_info), frozen_rates(config)
        saver = checkpoint.Saver(checkpoints, keep=1)

        def step() -> float:
            return seconds(lambda: train_step.step(views, 0, rates), rank_info.device)

        for _ in range(warm_up_steps(train_step, WARMUP)):
            step()
        alone, beside, copying, saving = [], [], [], []
        for number in range(saves):
            began = time.perf_counter()
            saver.start(number, train_step.state(number))
            copying.append(time.perf_counter() - began)
            steps = []
            while not _on_all_ranks(saver.done()):
                steps.append(step())
            saving.append(time.perf_counter() - began)
            if not saver.wait():
                raise ValueError(f"bench save: cannot write a checkpoint in {checkpoints}")
            beside += steps[:-1]  # the save ended during the last one
            alone += [step() for _ in steps]
        if not beside:
            raise ValueError(
                f"bench save: a checkpoint takes {max(saving):.2g} s, less than a step; need a larger model or bank"
            )
        return {
            **describe(config, rank_info),
            "checkpoint_bytes": sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file()),
            "saves": saves,
            "steps": len(beside),
            "copy_seconds": statistics.median(copying),
            "save_seconds": statistics.median(saving),
            "step_seconds": statistics.median(alone),
            "beside_seconds": statistics.median(beside),
            "ratio": statistics.median(beside) / statistics.median(alone),
        }


def _on_all_ranks(done: bool) -> bool:
    """Return whether all ranks are done, so that all take the same number of steps."""
    flag = torch.tensor(int(done))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as a table and write it to `out` as JSON."""
    print_table(
        title(result),
        ("", ""),
        [
            ("checkpoint", f"{result['checkpoint_bytes'] / 1e6:.0f} MB"),
            ("training waits for the copy", f"{1e3 * result['copy_seconds']:.0f} ms"),
            ("written after", f"{result['save_seconds']:.1f} s"),
            (),
            ("step", f"{1e3 * result['step_seconds']:.0f} ms"),
            (f"step beside it ({result['steps']})", f"{1e3 * result['beside_seconds']:.0f} ms"),
            ("ratio", f"{result['ratio']:.2f}"),
        ],
    )
    write_result(out, result)
