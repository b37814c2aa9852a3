"""Installs the requirement files, with the builds of torch and DALI that fit this machine's NVIDIA driver.

    python -m trainer.ops.install [--cuda 12|13|cpu] [--oldest] [PART …]

`core` is always installed; other parts are the names of requirement files (dali deepspeed export wandb dev), or `all`.
Uses the standard library only, because it runs before anything else is installed. `trainer.ops.doctor` uses the same
rules to check what is installed.
"""

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Literal

Cuda = Literal["12", "13", "cpu"]

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
PIP = (sys.executable, "-m", "pip")
PARTS = ("dali", "deepspeed", "export", "wandb", "dev")
# First driver that runs programs built for any CUDA of this major version:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
FIRST_DRIVER = {"13": 580, "12": 525}
TORCH_INDEX = "https://download.pytorch.org/whl"
# The builds of torch that PyPI does not have. PyPI's is for CUDA 13 and runs on CPUs as well.
INDEX_OF: dict[str, str] = {"12": f"{TORCH_INDEX}/cu126", "cpu": f"{TORCH_INDEX}/cpu"}
DALI = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}
NAMES = {"12": "CUDA 12", "13": "CUDA 13", "cpu": "CPUs"}


def find_driver() -> str | None:
    """Return the version of the NVIDIA driver, such as 580.65.06, or None if there is none."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        if not (program := shutil.which("nvidia-smi")):  # WSL has no such file
            return None
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+", text)
    return found.group() if found else None


def newest_cuda(driver: str) -> str | None:
    """Return the newest major version of CUDA that the driver runs, "13" or "12", or None if it is too old for both."""
    return next((cuda for cuda, first in FIRST_DRIVER.items() if int(driver.split(".")[0]) >= first), None)


def misfit(driver: str | None, cuda: str | None, package: str) -> str | None:
    """Return what is wrong with a package built for `cuda` ("13.0", "12"; None: for CPUs) on this driver, or None."""
    if driver is None:
        return None
    runs = newest_cuda(driver)
    if runs is None:
        return f"driver {driver} is too old for CUDA 12: ask for 525 or newer"
    if cuda is None:
        return f"{package} is built for CPUs, but there is a GPU driver, {driver}: make venv CUDA={runs}"
    built = cuda.split(".")[0]
    if int(built) > int(runs):
        return (
            f"driver {driver} runs CUDA {runs}, but {package} is built for CUDA {cuda}: "
            f"make venv CUDA={runs}, or a driver {FIRST_DRIVER.get(built, 'that is newer')} or newer"
        )
    return None


def installed_build() -> Cuda | None:
    """Return which build of torch this Python has, or None if it has none. Does not import torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    return build_of(Path(found.origin).parent)


def build_of(package: Path) -> Cuda:
    """Return which build a folder of the package torch is."""
    cuda = re.search(r"^cuda\b.*= '(\d+)", (package / "version.py").read_text(encoding="utf-8"), re.M)
    return "cpu" if cuda is None else "12" if cuda[1] == "12" else "13"


def choose_build(asked: Cuda | None, driver: str | None, installed: Cuda | None, is_cluster: bool) -> tuple[Cuda, str]:
    """Choose the build of torch to install.

    Args:
        asked: The build that the user asked for.
        driver: Version of the driver.
        installed: The build that is installed already.
        is_cluster: Whether SLURM is on this machine, whose nodes may have GPUs that this one has not.

    Returns:
        The build, and the reason for it in words.

    Raises:
        ValueError: The driver is too old for CUDA 12.
    """
    if asked:
        return asked, "as asked"
    if installed:
        return installed, "as installed; CUDA=12, 13 or cpu changes it"
    if driver:
        match newest_cuda(driver):
            case "13":
                return "13", f"for driver {driver}"
            case "12":
                return "12", f"for driver {driver}"
        raise ValueError(f"{misfit(driver, '12', 'torch')}, or set CUDA=cpu")
    if is_cluster:
        return "13", "no driver here, but SLURM: if `srun nvidia-smi` shows a driver below 580, set CUDA=12"
    return "cpu", "no NVIDIA driver"


def install(parts: list[str], asked: Cuda | None, oldest: bool) -> None:
    """Install `core` and `parts` into this Python. Exits with a message, or with pip's code, if that fails."""
    lock = REQUIREMENTS / ("lock-oldest.txt" if oldest else "lock.txt")
    installed = installed_build()
    build, reason = choose_build(asked, find_driver(), installed, shutil.which("sbatch") is not None)
    print(
        f"Installing {', '.join(['core', *parts])} into {sys.prefix}, torch for {NAMES[build]} ({reason})", flush=True
    )
    is_current = build == installed and f"torch=={version_of('torch')}".split("+")[0] in lock.read_text().splitlines()
    if not is_current and (build in INDEX_OF or installed):
        build = _install_torch(build, lock)
    if "dali" in parts and version_of(DALI["13" if build == "12" else "12"]):
        _pip("uninstall", "-y", *DALI.values())  # both builds own the same folder
    files = ["core", *("dali-cuda12" if part == "dali" and build == "12" else part for part in parts)]
    _pip("install", "-c", str(lock), *(x for name in files for x in ("-r", str(REQUIREMENTS / f"{name}.txt"))))


def _install_torch(build: Cuda, lock: Path) -> Cuda:
    """Install torch and torchvision without what they depend on. Returns the build that is installed then."""
    index = INDEX_OF.get(build)
    if index and not _reaches(f"{index}/torch/"):
        if build == "12":
            sys.exit(f"error: torch for CUDA 12 is at {index}, which cannot be reached; CUDA=cpu trains on the CPU")
        print(f"{index} cannot be reached: taking PyPI's build for CUDA 13, which is larger and runs on CPUs as well")
        return "13"
    options = ["--index-url", index] if index else []
    _pip("install", "--force-reinstall", "--no-deps", "-c", str(lock), *options, "torch", "torchvision")
    return build


def _reaches(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:
        return False


def _pip(*arguments: str) -> None:
    done = subprocess.run([*PIP, *arguments, "-qq", "--disable-pip-version-check"], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Read the command line and install."""
    parser = argparse.ArgumentParser(prog="python -m trainer.ops.install", description="Installs requirement files.")
    parser.add_argument("--cuda", default="auto", choices=["auto", "12", "13", "cpu"], help="build of torch and DALI")
    parser.add_argument("--oldest", action="store_true", help="the oldest supported versions instead of the newest")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or all")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {*PARTS, "all"}:
        parser.error(f"unknown: {', '.join(unknown)}; the parts are {', '.join(PARTS)} and all")
    parts = list(PARTS) if "all" in arguments.parts else arguments.parts
    try:
        install(parts, None if arguments.cuda == "auto" else arguments.cuda, arguments.oldest)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
