"""The parts of `bench gpu` in their order: what a wrong result would spoil comes first. The last may get no time."""

from pathlib import Path

import torch

from trainer.bench.gpu import kernels, losses, ranks, runner, runs, speed
from trainer.bench.gpu.record import Setting
from trainer.bench.gpu.runner import Part

PARTS = [
    Part("kernels", kernels.check, 120),
    Part("losses", losses.check_losses, 150),
    Part("ranks", ranks.check_ranks, 120),
    Part("killed-rank", ranks.check_killed_rank, 90),
    Part("host-reads", losses.check_host_reads, 60),
    Part("throughput", speed.check_throughput, 120),
    Part("fp16", losses.check_fp16, 60),
    Part("fp16-speed", speed.check_fp16_speed, 60),
    Part("compile", speed.check_compile, 240),
    Part("profile", speed.check_profile, 60),
    Part("resume", runs.check_resume, 60),
    Part("methods", losses.check_methods, 90),
    Part("roofline", kernels.check_speed, 90),
    Part("dali", runs.check_dali, 60),
]
SECONDS = 600.0  # for all parts


def run(device: str, names: list[str] | None, folder: Path) -> bool:
    """Run the parts `names`, or all of them, on a device and write their record; see `trainer.bench.gpu.runner`.

    Returns whether no line failed. Raises ValueError if there is no such part or device, or if all parts are to run
    although the folder has a record.
    """
    known = [part.name for part in PARTS]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"--parts: got {unknown[0]!r}, need some of {', '.join(known)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "got a machine without a CUDA device, which bench gpu measures; --device cpu runs its lines on small "
            "sizes, and `bench kernels` measures this CPU"
        )
    if names is None and (folder / runner.RECORD).exists():
        raise ValueError(
            f"--out: {folder} has a record already: give another folder, or delete it; --parts runs some parts again"
        )
    setting = Setting(torch.device(device, 0) if device == "cuda" else torch.device("cpu"), folder)
    patience = 6 if setting.small else 1  # a test machine may be slow and have other work; a hang still ends
    chosen = [part for part in PARTS if names is None or part.name in names]
    return runner.run([part._replace(limit=patience * part.limit) for part in chosen], setting, patience * SECONDS)
