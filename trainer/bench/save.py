"""What a checkpoint costs the steps beside which it is written."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from trainer import distributed
from trainer.bench.step import make_batch, timed
from trainer.build import fill_bank
from trainer.config import Config
from trainer.run import checkpoint
from trainer.run.files import write_json
from trainer.run.sources import open_training
from trainer.train_step import Rates, TrainStep


def run(config: Config, folder: Path | None, saves: int) -> dict[str, Any]:
    """Medians over `saves` checkpoints, written in `folder` (None: the system's temporary one) and deleted again.

    step_seconds: of a step while nothing is written, between two checkpoints as many as beside one. beside_seconds: of
    a step beside a save. copy_seconds: what training waits for before each save. save_seconds: until all is written.
    """
    with (
        distributed.process_group(config.run.device) as rank_info,
        tempfile.TemporaryDirectory(dir=folder) as temporary,
    ):
        names: list[Any] = [temporary]
        dist.broadcast_object_list(names)
        train = open_training(config, Path(temporary))
        train_step, views = TrainStep(config, rank_info), make_batch(config, rank_info, train)
        fill_bank(train_step.method.bank, config, rank_info, train)
        rates = Rates(lr=0.0, bank_lr=0.0, teacher_momentum=config.method.teacher_momentum)
        saver = checkpoint.Saver(Path(names[0]) / "checkpoints", keep=1)

        def step() -> float:
            return timed(lambda: train_step.step(views, 0, rates), rank_info.device)

        for _ in range(3):  # they choose algorithms and allocate
            step()
        alone, beside, copying, saving = [], [], [], []
        for number in range(saves):
            began = time.perf_counter()
            saver.start(number, train_step.state(number))
            copying.append(time.perf_counter() - began)
            steps = []
            while not _all(saver.done()):
                steps.append(step())
            saving.append(time.perf_counter() - began)
            if not saver.wait():
                raise ValueError(f"bench save: {names[0]} does not take a checkpoint")
            beside += steps[:-1]  # the last one ended without the writer
            alone += [step() for _ in steps]
        if not beside:
            raise ValueError(f"bench save: a checkpoint takes {max(saving):.2g} s, less than a step; need a larger one")
        size = sum(file.stat().st_size for file in (Path(names[0]) / "checkpoints").rglob("*") if file.is_file())
        return {
            "backbone": config.model.backbone,
            "batch_size": config.data.batch_size,
            "negatives": config.bank.size,
            "device": rank_info.device.type,
            "ranks": rank_info.world_size,
            "checkpoint_bytes": size,
            "saves": saves,
            "steps": len(beside),
            "copy_seconds": statistics.median(copying),
            "save_seconds": statistics.median(saving),
            "step_seconds": statistics.median(alone),
            "beside_seconds": statistics.median(beside),
            "ratio": statistics.median(beside) / statistics.median(alone),
        }


def _all(done: bool) -> bool:
    """Whether all ranks are: they must take the same steps."""
    flag = torch.tensor(int(done))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as a table and write it to `out` as JSON."""
    table = Table(
        title=f"{result['backbone']}, batch {result['batch_size']}, {result['negatives']} negatives", box=None
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("checkpoint", f"{result['checkpoint_bytes'] / 1e6:.0f} MB")
    table.add_row("copied in, while training waits", f"{1e3 * result['copy_seconds']:.0f} ms")
    table.add_row("written in, beside training", f"{result['save_seconds']:.1f} s", end_section=True)
    table.add_row("step", f"{1e3 * result['step_seconds']:.0f} ms")
    table.add_row(f"step beside it ({result['steps']})", f"{1e3 * result['beside_seconds']:.0f} ms")
    table.add_row("ratio", f"{result['ratio']:.2f}")
    Console().print(table)
    if out:
        write_json(out, result)
