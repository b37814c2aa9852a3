"""Checks what this machine has for training, and whether it has what a configuration needs."""

import importlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data import shared_memory
from data.extras import requirement_file
from data.sources.base import Source
from data.sources.open import open_source
from trainer.config import Config
from trainer.distributed import files_needed, raise_file_limit
from trainer.ops.install import DALI, find_driver, misfit, newest_cuda, version_of
from trainer.run.files import existing_parent
from trainer.run.sources import shared_memory_bytes


class Check(NamedTuple):
    """The result of a check: `absent` things are optional, `missing` ones are needed."""

    name: str
    state: Literal["ok", "absent", "missing"]
    detail: str


def run_checks(config: Config | None) -> list[Check]:
    """Check the machine and, if given, a configuration. Changes nothing."""
    checks = [_check_cpu(), *_check_gpus(), _check_driver(), _check_nccl(), *map(_check_extra, EXTRAS), _check_slurm()]
    checks += [_check_open_files(), check_disk(Path.cwd())]
    return checks + (_check_config(config) if config else [])


def print_checks(checks: list[Check]) -> bool:
    """Print the checks as a table; returns False if anything needed is missing."""
    colors = {"ok": "green", "absent": "dim", "missing": "red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "state", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{colors[check.state]}]{check.state}[/]", escape(check.detail))
    Console().print(table)
    return all(check.state != "missing" for check in checks)


class Extra(NamedTuple):
    """Optional packages: what they are called, their requirement file, their packages, and a module to try."""

    name: str
    requirements: str
    packages: tuple[str, ...]
    module: str


EXTRAS = (
    Extra("Triton", "dev", ("triton",), "triton"),  # comes with torch's builds for CUDA
    Extra("DALI", "dali", tuple(DALI.values()), "nvidia.dali"),
    Extra("DeepSpeed", "deepspeed", ("deepspeed",), "deepspeed"),
    Extra("ONNX export", "export", ("onnx", "onnxscript", "onnxruntime"), "onnxruntime"),
    Extra("W&B", "wandb", ("wandb",), "wandb"),
    Extra("tests, lint", "dev", ("pytest", "ruff", "mypy"), "pytest"),
)


def _check_cpu() -> Check:
    memory = psutil.virtual_memory().total / 2**30
    return Check("CPU", "ok", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory")


def _check_gpus() -> list[Check]:
    if not torch.cuda.is_available():
        return [Check("GPU", "absent", f"torch {torch.__version__} sees none: training runs on the CPU")]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info(i))
        bf16 = "bf16" if properties.major >= 8 else "no bf16"
        found.append(Check(f"GPU {i}", "ok", f"{properties.name}, {free:.0f} of {total:.0f} GiB free, {bf16}"))
    problem = compiler_problem()
    return [*found, Check("compiler", "missing" if problem else "ok", problem or "for Triton")]


def _check_nccl() -> Check:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return Check("NCCL", "absent", "several processes use gloo")
    return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def driver_problem() -> str | None:
    """Return why torch or DALI cannot use this machine's GPUs with its driver and what to do about it, or None."""
    driver = find_driver()
    if problem := misfit(driver, torch.version.cuda, f"torch {torch.__version__}"):
        return problem
    builds = {cuda: package for cuda, package in DALI.items() if version_of(package)}
    if driver and len(builds) > 1:
        return f"{' and '.join(builds.values())} overwrite each other: pip uninstall both, then make venv CUDA=12 or 13"
    return next((problem for cuda, package in builds.items() if (problem := misfit(driver, cuda, package))), None)


def _check_driver() -> Check:
    driver, cuda = find_driver(), torch.version.cuda
    runtime = version_of("nvidia-cuda-runtime") or version_of("nvidia-cuda-runtime-cu12")
    built = f"CUDA {cuda}, runtime {runtime}" if cuda else "CPUs"
    dali = "".join(f"; {name} {version_of(name)}" for name in DALI.values() if version_of(name))
    if problem := driver_problem():
        return Check("driver", "missing", problem)
    runs = f"{driver}, which runs CUDA {newest_cuda(driver)}" if driver else "none"
    return Check("driver", "ok" if driver else "absent", f"{runs}; torch {torch.__version__} for {built}{dali}")


def _check_extra(extra: Extra) -> Check:
    found = [f"{package} {version}" for package in extra.packages if (version := version_of(package))]
    try:
        importlib.import_module(extra.module)
        return Check(extra.name, "ok", ", ".join(found))
    except (ImportError, OSError) as error:
        file = requirement_file(extra.requirements)
        return Check(extra.name, "absent", str(error) if found else f"pip install -r {file} installs it")


def compiler_problem() -> str | None:
    """Return what Triton lacks to compile its launcher at the first step on a GPU, or None."""
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "Triton needs a C compiler: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton needs Python.h: install Debian's python3-dev or its equivalent"
    return None


def missing_extras(config: Config) -> dict[str, str]:
    """Return the settings that need an optional package that is not installed, with how to install it."""
    device = torch.device("cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu")
    needed = {
        "data.backend": "DALI" if config.data.backend_for(device) == "dali" else None,
        "engine.kind": "DeepSpeed" if config.engine.kind == "deepspeed" else None,
        "monitor.wandb": "W&B" if config.monitor.wandb else None,
    }
    checks = {key: _check_extra(extra) for key, name in needed.items() for extra in EXTRAS if extra.name == name}
    return {key: f"{check.name}: {check.detail}" for key, check in checks.items() if check.state != "ok"}


def _check_open_files() -> Check:
    limit = raise_file_limit()
    state: Literal["ok", "missing"] = "ok" if limit >= files_needed(8) else "missing"
    ranks = (limit - files_needed(0)) // (files_needed(1) - files_needed(0))
    return Check("open files", state, f"at most {limit:,} (ulimit -Hn): enough for {max(0, ranks):,} ranks")


def _check_slurm() -> Check:
    if shutil.which("sbatch") is None:
        return Check("SLURM", "absent", "sbatch is not on PATH: start with python -m trainer, or torchrun")
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return Check("SLURM", "ok", version)


def check_disk(folder: Path) -> Check:
    """Check that at least 1 GiB is free in `folder`, which need not exist yet, and that it is writable."""
    folder = existing_parent(folder)
    free = shutil.disk_usage(folder).free / 2**30
    writable = os.access(folder, os.W_OK)
    detail = f"{free:.1f} GiB free at {folder}" + ("" if writable else ", which is not writable")
    return Check("disk", "ok" if writable and free >= 1 else "missing", detail)


def _check_shared_memory(config: Config, train: Source) -> Check:
    """Check the shared memory for torchrun's ranks or, without it, for one rank per GPU of this machine."""
    on_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or (torch.cuda.device_count() if on_gpu else 1))
    world_size = int(os.environ.get("WORLD_SIZE") or ranks)
    needed = shared_memory_bytes(config, train, torch.device("cuda" if on_gpu else "cpu"), world_size)
    if problem := shared_memory.shortage(needed, ranks):
        return Check(str(shared_memory.FOLDER), "missing", problem)
    return Check(str(shared_memory.FOLDER), "ok", f"{needed * ranks / 1e6:,.0f} MB needed for batches made ahead")


def _check_config(config: Config) -> list[Check]:
    checks = []
    for name, path in config.data.paths.items():
        try:
            source = open_source(path)
            checks.append(
                Check(f"data.{name}", "ok", f"{len(source)} images in {len(source.classes)} classes at {path}")
            )
            if name == "train":
                checks.append(_check_shared_memory(config, source))
        except (ValueError, OSError) as error:
            checks.append(Check(f"data.{name}", "missing", str(error)))
    if config.run.device == "cuda" and not torch.cuda.is_available():
        checks.append(Check("run.device", "missing", "cuda, but torch sees no GPU"))
    if config.run.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        checks.append(Check("run.precision", "missing", "bf16, which this GPU does not support"))
    checks += [Check(key, "missing", problem) for key, problem in missing_extras(config).items()]
    cores = len(os.sched_getaffinity(0))
    if config.data.workers is not None and config.data.workers > cores:
        checks.append(Check("data.workers", "absent", f"{config.data.workers} processes per rank for {cores} cores"))
    checks.append(check_disk(Path(config.run.dir))._replace(name="run.dir"))
    return checks
