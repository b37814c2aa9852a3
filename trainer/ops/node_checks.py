"""The checks that a node makes on itself in the preflight: address, versions, free memory, and missing parts."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
from collections import Counter
from pathlib import Path

import psutil
import torch

from data.sources.open import find_files
from trainer.config import Config
from trainer.distributed import files_needed, raise_file_limit, read_launch_variables
from trainer.ops.doctor import check_disk, compiler_problem, driver_problem, missing_extras
from trainer.ops.install import find_driver


def node_name() -> str:
    """Return the name that SLURM knows this node by, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_address() -> str:
    """Return this node's IPv4 address as gloo chooses it: of GLOO_SOCKET_IFNAME, or of the host name; "" if unknown."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        found = psutil.net_if_addrs().get(interface, [])
        return next((address.address for address in found if address.family == socket.AF_INET), "")
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def find_versions() -> dict[str, str]:
    """Return what must be equal on all nodes, by name."""
    packages: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        packages.setdefault(f"package {found.metadata['Name']}", found.version)  # Python imports the first on the path
    code = hashlib.sha256()
    root = Path(__file__).parents[2]
    for folder in ("trainer", "models", "data", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            code.update(path.read_bytes())
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        **packages,
        "code": code.hexdigest()[:12],
        "Python": platform.python_version(),
        "GPUs": ", ".join(f"{n} x {name}" for name, n in gpus.items()) or "none",
        "driver": find_driver() or "none",
        "ranks": str(read_launch_variables().local_world_size),
    }


def free_memory() -> float:
    """Return the free host memory in GiB."""
    return float(psutil.virtual_memory().available / 2**30)


def find_problems(config: Config | None) -> list[str]:
    """Return what this node lacks. Only one image is read, because training lists the millions of files itself."""
    problems = []
    launch, gpus = read_launch_variables(), torch.cuda.device_count()
    ranks = launch.local_world_size
    device = config.run.device if config else "auto"
    expected = gpus or int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)  # a container without --nv sees no GPUs
    if gpus < ranks and (device == "cuda" or (device == "auto" and expected)):
        problems.append(f"sees {gpus} GPUs for {ranks} ranks")
    for i in range(min(gpus, ranks)):
        free, total = torch.cuda.mem_get_info(i)
        if free < 0.85 * total:
            problems.append(f"GPU {i}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process is on it")
    if device != "cpu" and (problem := driver_problem()):
        problems.append(problem)
    if gpus and (problem := compiler_problem()):
        problems.append(problem)
    if (shared := shutil.disk_usage("/dev/shm").total / 2**30) < 1:
        problems.append(f"/dev/shm has {shared:.2f} GiB, but batches need it: docker run --ipc=host")
    if (limit := raise_file_limit()) < (needed := files_needed(launch.world_size)):
        problems.append(
            f"at most {limit} open files (ulimit -Hn), but {launch.world_size} ranks need up to {needed} in a process"
        )
    if config is None:
        return problems
    problems += [f"{key}: {problem}" for key, problem in missing_extras(config).items()]
    for name, path in config.data.paths.items():
        try:
            _read_one(Path(path))
        except (ValueError, OSError) as error:
            problems.append(f"data.{name}: {error}")
    disk = check_disk(Path(config.run.dir))
    return problems if disk.state == "ok" else [*problems, f"run.dir: {disk.detail}"]


def _read_one(path: Path) -> None:
    """Read one byte, or list one name, of a data set. Raises ValueError or OSError."""
    files = find_files(path)
    if files:
        with files[0].open("rb") as file:
            file.read(1)
    elif next(os.scandir(path), None) is None:
        raise ValueError(f"{path} is empty")
