"""Downloads Fashion-MNIST (70,000 labelled 28 x 28 images, MIT licence) into a folder.

    python -m data.sources.fashion_mnist DEST

Source: https://github.com/zalandoresearch/fashion-mnist, or Debian's package of it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def complete(folder: Path) -> bool:
    """Return whether the four files are in `folder`."""
    return all((folder / name).is_file() for name in FILES)


def copy_files(source: Path, dest: Path) -> None:
    """Copy the four files, each atomically."""
    dest.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        temporary = dest / f".{name}.{os.getpid()}"
        shutil.copyfile(source / name, temporary)
        os.replace(temporary, dest / name)


def from_installed(dest: Path) -> None:
    """Copy the files of Debian's package, if it is installed."""
    copy_files(INSTALLED, dest)


def from_apt(dest: Path) -> None:
    """Download Debian's package and unpack it, which needs no root rights, unlike an installation."""
    with tempfile.TemporaryDirectory() as temporary:
        # For the download, apt drops its root rights, and then it must be able to write here.
        os.chmod(temporary, 0o777)

        def run(*command: str) -> None:
            subprocess.run(command, cwd=temporary, check=True, capture_output=True)

        try:
            run("apt-get", "download", PACKAGE)
        except subprocess.CalledProcessError:
            if os.geteuid() != 0:
                raise
            run("apt-get", "update")  # a fresh container has no package lists
            run("apt-get", "download", PACKAGE)
        (package,) = Path(temporary).glob("*.deb")
        run("dpkg", "-x", package.name, "unpacked")
        copy_files(Path(temporary, "unpacked") / INSTALLED.relative_to("/"), dest)


def from_torchvision(dest: Path) -> None:
    """Download the files from the authors' server with torchvision."""
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as temporary:
        for train in (True, False):
            FashionMNIST(temporary, train=train, download=True)
        copy_files(Path(temporary, "FashionMNIST", "raw"), dest)


def fetch(dest: Path) -> str | None:
    """Put the four files into `dest` by the first way that works; return the reasons if none does."""
    if complete(dest):
        return None
    ways: list[Callable[[Path], None]] = [from_installed, from_apt, from_torchvision]
    reasons = []
    for way in ways:
        try:
            way(dest)
            return None
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            reasons.append(f"{way.__name__}: {error}".splitlines()[0])
    return (
        f"Fashion-MNIST is not in {dest} and cannot be fetched: apt-get install {PACKAGE}, or allow access to the "
        f"internet for torchvision ({'; '.join(reasons)})"
    )


def main() -> int:
    """Run the command line and return the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m data.sources.fashion_mnist DEST", file=sys.stderr)
        return 2
    dest = Path(sys.argv[1])
    if failure := fetch(dest):
        print(failure, file=sys.stderr)
        return 1
    (dest / "classes.txt").write_text("".join(name + "\n" for name in CLASSES), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
