import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision import datasets

from data.sources import fashion_mnist
from data.sources.fashion_mnist import FILES, PACKAGE, complete, fetch, main


def fill(folder: Path) -> Path:
    """Write the four files, each with its own name as its contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(name)
    return folder


def assert_filled(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert all((folder / name).read_text() == name for name in FILES)


def from_apt(dest: Path) -> None:
    raise subprocess.CalledProcessError(100, ["apt-get", "download"])


def from_torchvision(dest: Path) -> None:
    raise RuntimeError("Error downloading\nmore about it")


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all sources of the files fail, unless a test replaces one."""
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "not-installed")
    monkeypatch.setattr(fashion_mnist, "from_apt", from_apt)
    monkeypatch.setattr(fashion_mnist, "from_torchvision", from_torchvision)


def test_names() -> None:
    assert sorted(FILES) == [
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


def test_from_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", fill(tmp_path / "installed"))
    assert fetch(tmp_path / "a" / "b") is None
    assert_filled(tmp_path / "a" / "b")


def test_existing_files_are_kept(tmp_path: Path) -> None:
    dest = fill(tmp_path / "dest")
    assert complete(dest)
    assert fetch(dest) is None
    (dest / FILES[2]).unlink()
    assert not complete(dest)
    assert fetch(dest) is not None


def test_an_incomplete_package_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = fill(tmp_path / "installed")
    (installed / FILES[3]).unlink()
    monkeypatch.setattr(fashion_mnist, "INSTALLED", installed)
    assert FILES[3] in (fetch(tmp_path / "dest") or "")


def test_from_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake commands do to files what apt-get and dpkg do; the package lists are missing at first."""
    commands = []

    def run(command: tuple[str, ...], cwd: str, check: bool, capture_output: bool) -> None:
        commands.append(command)
        if command[:2] == ("apt-get", "download"):
            if len(commands) == 1:
                raise subprocess.CalledProcessError(100, command)
            Path(cwd, f"{command[2]}_0.0_all.deb").touch()
        elif command[0] == "dpkg":
            assert Path(cwd, command[2]).is_file()
            fill(Path(cwd, command[3], "usr/share/datasets/fashion-mnist"))

    monkeypatch.undo()
    monkeypatch.setattr(fashion_mnist, "INSTALLED", Path("/usr/share/datasets/fashion-mnist"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    fashion_mnist.from_apt(tmp_path / "dest")
    assert_filled(tmp_path / "dest")
    assert [command[:2] for command in commands] == [
        ("apt-get", "download"),
        ("apt-get", "update"),
        ("apt-get", "download"),
        ("dpkg", "-x"),
    ]


def test_from_apt_without_root_does_not_try_to_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], cwd: str, check: bool, capture_output: bool) -> None:
        assert command[:2] == ("apt-get", "download")
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(subprocess.CalledProcessError):
        fashion_mnist.from_apt(tmp_path / "dest")


def test_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(root: str, train: bool, download: bool) -> None:
        asked.append((train, download))
        if train:
            fill(Path(root, "FashionMNIST", "raw"))

    monkeypatch.undo()
    monkeypatch.setattr(datasets, "FashionMNIST", download)
    fashion_mnist.from_torchvision(tmp_path / "dest")
    assert_filled(tmp_path / "dest")
    assert asked == [(True, True), (False, True)]


def test_ways_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def works(dest: Path) -> None:
        tried.append(dest)
        fill(dest)

    monkeypatch.setattr(fashion_mnist, "from_torchvision", works)
    assert fetch(tmp_path / "dest") is None
    assert tried == [tmp_path / "dest"]
    assert_filled(tmp_path / "dest")


def test_a_failure_names_the_remedy(tmp_path: Path) -> None:
    message = fetch(tmp_path / "dest") or ""
    assert f"apt-get install {PACKAGE}" in message
    assert "access to the internet for torchvision" in message
    assert "from_installed: " in message
    assert "from_apt: " in message
    assert "from_torchvision: Error downloading" in message
    assert "\n" not in message


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fashion_mnist", str(tmp_path / "dest")])
    assert main() == 1
    assert f"apt-get install {PACKAGE}" in capsys.readouterr().err
    monkeypatch.setattr(fashion_mnist, "INSTALLED", fill(tmp_path / "installed"))
    assert main() == 0
    assert complete(tmp_path / "dest")
    assert (tmp_path / "dest/classes.txt").read_text().splitlines()[9] == "Ankle boot"
    monkeypatch.setattr(sys, "argv", ["fashion_mnist", "--help"])
    assert main() == 2
    assert "usage" in capsys.readouterr().err
