"""One step of the negatives with a bank as large as this machine's memory: time, memory, and what others would need.

The step is that of training in one process: `models.negatives.contrast` on random queries and keys, its gradient, and
the bank's own step. N queries and as many keys, K negatives, D dimensions.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from models.negatives.bank import Bank, make_mesh
from models.negatives.contrast import contrast
from trainer import distributed
from trainer.bench.kernels import ADVERSARY_TEMPERATURE, LR, MOMENTUM, TEMPERATURE, WEIGHT_DECAY, materialised_peak
from trainer.build import DTYPES

_FILL_ROWS = 2**18  # made at a time


def run(rows: int, negatives: int, dim: int, precision: str, weights: str, velocity: str, steps: int) -> dict[str, Any]:
    """Fill a bank at random and play `steps` steps against it. Types by name: fp32, fp16, bf16; velocity also none.

    seconds: of each step's two halves, score (with its gradient) and adversary. bank_bytes: of its tensors.
    peak_rss_bytes: the most the process ever held. materialised_bytes: what the formulation that stores N x K tensors
    would hold: its bank in fp32 and what a step of it allocates, measured at two small K and extended in a line.
    """
    momentum = 0.0 if velocity == "none" else MOMENTUM
    with distributed.process_group("cpu") as rank_info:
        bank = Bank(
            negatives,
            dim,
            make_mesh("sharded", rank_info.device, rank_info.local_world_size),
            kernels="chunked",
            temperature=ADVERSARY_TEMPERATURE,
            momentum=momentum,
            weight_decay=WEIGHT_DECAY,
            precision=DTYPES[precision],
            weights=DTYPES[weights],
            velocity=None if velocity == "none" else DTYPES[velocity],
        )
        generator = torch.Generator().manual_seed(0)
        for part in bank.w_KD.split(_FILL_ROWS):
            part.copy_(F.normalize(torch.randn(len(part), dim, generator=generator), dim=1))
        bank.loaded()
        halves = []
        for step in range(steps):
            q_ND = F.normalize(torch.randn(rows, dim, generator=generator), dim=1).requires_grad_()
            k_ND = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
            began = time.perf_counter()
            result = contrast(q_ND, k_ND, bank, TEMPERATURE, batch_keys=True)
            result.loss_N.mean().backward()
            scored = time.perf_counter()
            stats = bank.step([result.rows(1 / rows)], LR * (1 - momentum) / (1 - MOMENTUM), seed=step)
            halves.append((scored - began, time.perf_counter() - scored))
        losses = [float(result.loss_N.detach().mean()), *bank.metrics(stats).values()]
        assert all(map(torch.isfinite, map(torch.tensor, losses)))
    tensors = [t for t in (bank.w_KD, bank.v_KD, bank.n_KD) if t is not None]
    small, large = (materialised_peak(rows, k, dim) for k in (8192, 16384))
    slope = (large - small) / 8192
    return {
        "N": rows,
        "K": negatives,
        "D": dim,
        "precision": precision,
        "weights": weights,
        "velocity": velocity,
        "score_seconds": [score for score, _ in halves],
        "adversary_seconds": [adversary for _, adversary in halves],
        "bank_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "materialised_bytes": round(small + slope * (negatives - 8192)) + 2 * 4 * negatives * dim,
    }


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the result of `run` as a table and write it to `out` as JSON."""
    table = Table(title=f"{result['K']:,} negatives, {result['N']} queries, D = {result['D']}", box=None)
    table.add_column("")
    table.add_column("", justify="right")
    for half in ("score", "adversary"):
        table.add_row(half, " ".join(f"{seconds:.2f}" for seconds in result[f"{half}_seconds"]) + " s")
    types = f"weights {result['weights']}, velocity {result['velocity']}, unit rows {result['precision']}"
    table.add_row(f"bank ({types})", f"{result['bank_bytes'] / 2**30:.2f} GiB")
    table.add_row("process at its largest", f"{result['peak_rss_bytes'] / 2**30:.2f} GiB")
    table.add_row("storing N x K tensors would take", f"{result['materialised_bytes'] / 2**30:.2f} GiB")
    Console().print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
