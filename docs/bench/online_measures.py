"""Measures the step with and without the linear probe, and the evaluation's measures without labels, on one thread.

    PYTHONPATH=. python docs/bench/online_measures.py CONFIG RESULT.json [section.key=value …]

Times are CPU times of this process in milliseconds: a busy machine changes them little. Steps with and without the
probe alternate; `difference` is the median over pairs, with the quartiles. Images are random.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.bench.harness import environment
from trainer.bench.synthetic import build_step, frozen_rates, random_views
from trainer.config_file import load
from trainer.distributed import RankInfo
from trainer.evaluate.online_probe import OnlineProbe
from trainer.evaluate.spread import SAMPLE, alignment, effective_rank, uniformity

PAIRS, WARM_UP, CLASSES = 40, 3, 10


def main() -> None:
    """Print the result as JSON, and write it to the file of the second argument."""
    config = load(Path(sys.argv[1]), ["run.device=cpu", "data.train=none", *sys.argv[3:]])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank_info = RankInfo(torch.device("cpu"), 0, 1, 1)
    train_step, views, rates = build_step(config, rank_info), random_views(config, rank_info), frozen_rates(config)
    student = train_step.method.student
    probe = OnlineProbe(student, CLASSES, rank_info.device)
    labels_B = torch.arange(len(views[0])).remainder(CLASSES).chunk(train_step.accumulate)[-1]
    with_probe, without, alone = [], [], []
    for number in range(2 * (WARM_UP + PAIRS)):
        uses_probe = number % 4 in (0, 3)  # with, without, without, with, …: a drift cancels out
        student.keeps_features = uses_probe
        start = time.process_time()
        train_step.step(views, number, rates)
        middle = time.process_time()
        if uses_probe:
            probe.step(labels_B, train_step.intact)
            alone.append(1e3 * (time.process_time() - middle))
        (with_probe if uses_probe else without).append(1e3 * (time.process_time() - start))
    pairs = [a - b for a, b in zip(with_probe[WARM_UP:], without[WARM_UP:], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    x_ND = torch.rand(SAMPLE, student.features_NF.shape[1])  # type: ignore[union-attr]
    start = time.process_time()
    effective_rank(x_ND), alignment(x_ND, x_ND), uniformity(x_ND)
    spread = 1e3 * (time.process_time() - start)
    step = statistics.median(without[WARM_UP:])
    result: dict[str, Any] = {
        "config": Path(sys.argv[1]).name,
        "overrides": sys.argv[3:],
        "pairs": PAIRS,
        "step": round(step, 2),
        "step_with_probe": round(statistics.median(with_probe[WARM_UP:]), 2),
        "difference": round(quartiles[1], 2),
        "difference_quartiles": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "probe_alone": round(statistics.median(alone[WARM_UP:]), 3),
        "probe_share": round(statistics.median(alone[WARM_UP:]) / step, 5),
        "spread_of_features_at_an_evaluation": round(spread, 1),
        **environment(),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    Path(sys.argv[2]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
