"""One step of the negatives with a bank as large as this machine's memory: time, memory, and what N x K would take.

The step is that of training in one process: `models.negatives.contrast` on random queries and keys, its gradient, and
the bank's update. Shapes: N queries and as many keys, K negatives, D dimensions.
"""

import math
import resource
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
from models.negatives.contrast import contrast
from trainer import distributed
from trainer.bench.harness import environment, print_table, write_result
from trainer.bench.kernels import PARAMS, TEMPERATURE, materialised_peak
from trainer.build import DTYPES
from trainer.run.phases import PhaseTimer

_FILL_ROWS = 2**18  # random rows made at a time


def run(rows: int, negatives: int, dim: int, precision: str, weights: str, velocity: str, steps: int) -> dict[str, Any]:
    """Fill a bank with random rows and take some steps.

    Args:
        rows: Number of queries N.
        negatives: Number of negatives K.
        dim: Dimensions D.
        precision: Type of queries, keys and unit rows: fp32, fp16 or bf16.
        weights: Type of the weights: fp32 or bf16.
        velocity: Type of the velocity: fp32, bf16, or none, which means a step without momentum.
        steps: Number of steps.

    Returns:
        A dictionary with the seconds of both halves of each step and with memory in bytes. materialised_bytes is that
        of the published formulation: its fp32 bank, and the peak of a step, extrapolated from two small K.
    """
    params = PARAMS
    if velocity == "none":
        params = PARAMS._replace(momentum=0.0, lr=PARAMS.lr / (1 - PARAMS.momentum))  # moves the bank as far
    with distributed.process_group("cpu") as rank_info:
        types = {"weights": weights, "velocity": velocity}
        settings = BankSettings.model_validate({"size": negatives, **types, **params._asdict()})
        mesh = make_mesh("sharded", rank_info.device, rank_info.local_world_size)
        bank = Bank(settings, dim, mesh, DTYPES[precision])
        generator = torch.Generator().manual_seed(0)

        def unit(count: int) -> torch.Tensor:
            return F.normalize(torch.randn(count, dim, generator=generator), dim=1)

        for chunk in bank.w_KD.split(_FILL_ROWS):
            chunk.copy_(unit(len(chunk)))
        bank.loaded()
        phases, halves = PhaseTimer(rank_info.device), []
        for step in range(steps):
            q_ND, k_ND = unit(rows).requires_grad_(), unit(rows)
            with phases("score"):
                result = contrast(q_ND, k_ND, bank, TEMPERATURE, batch_keys=True)
                result.loss_N.mean().backward()
            with phases("adversary"):
                bank.update([[result.bank_update(1 / rows)]], params.lr, seed=step)
            halves.append(phases.pop())
        values = [float(result.loss_N.detach().mean()), *bank.metrics().values()]
        assert all(map(math.isfinite, values)), values
    small, large = (materialised_peak(rows, k, dim) for k in (8192, 16384))
    peak = small + (large - small) / 8192 * (negatives - 8192)
    return {
        "N": rows,
        "K": negatives,
        "D": dim,
        "precision": precision,
        "weights": weights,
        "velocity": velocity,
        "score_seconds": [half["score"] for half in halves],
        "adversary_seconds": [half["adversary"] for half in halves],
        "bank_bytes": sum(x.nbytes for x in bank.tensors()),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "materialised_bytes": round(peak) + 2 * 4 * negatives * dim,
        **environment(),
    }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as a table and write it to `out` as JSON."""
    types = f"weights {result['weights']}, velocity {result['velocity']}, unit rows {result['precision']}"
    print_table(
        f"{result['K']:,} negatives, {result['N']} queries, D = {result['D']}",
        ("", ""),
        [
            *(
                (half, " ".join(f"{x:.2f}" for x in result[f"{half}_seconds"]) + " s")
                for half in ("score", "adversary")
            ),
            (f"bank ({types})", f"{result['bank_bytes'] / 2**30:.2f} GiB"),
            ("peak memory of the process", f"{result['peak_rss_bytes'] / 2**30:.2f} GiB"),
            ("storing N x K tensors would take", f"{result['materialised_bytes'] / 2**30:.2f} GiB"),
        ],
    )
    write_result(out, result)
