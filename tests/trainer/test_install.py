"""Which builds of torch and DALI are installed, and what pip is told."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trainer.ops import install
from trainer.ops.install import Cuda, choose_build, misfit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("asked", "driver", "installed", "cluster", "build"),
    [
        (None, None, None, False, "cpu"),
        (None, None, None, True, "13"),
        (None, "580.65.06", None, False, "13"),
        (None, "610.10", None, True, "13"),
        (None, "575.51.03", None, False, "12"),
        (None, "525.60.13", None, True, "12"),
        ("cpu", "580.65.06", "13", False, "cpu"),
        ("12", None, None, False, "12"),
        (None, "580.65.06", "12", False, "12"),
    ],
)
def test_the_build_fits_the_driver(
    asked: Cuda | None, driver: str | None, installed: Cuda | None, cluster: bool, build: str
) -> None:
    assert choose_build(asked, driver, installed, cluster)[0] == build


def test_a_driver_that_is_too_old_for_all() -> None:
    with pytest.raises(ValueError, match=r"driver 470\.82 is too old .* 525 or newer, or set CUDA=cpu"):
        choose_build(None, "470.82", None, False)
    assert choose_build("cpu", "470.82", None, False)[0] == "cpu"


@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        (None, "13.0", None),
        (None, None, None),
        ("580.65.06", "13.0", None),
        ("580.65.06", "12.6", None),
        ("535.104.05", "12.6", None),
        ("535.104.05", "13.0", "driver 535.104.05 runs CUDA 12, but x is built for CUDA 13.0: make venv CUDA=12"),
        ("570.1", "13", "or a driver 580 or newer"),
        ("450.1", "12.6", "too old"),
        ("570.1", None, "x is built for CPUs, but there is a GPU driver, 570.1: make venv CUDA=12"),
    ],
)
def test_what_does_not_fit_names_the_cure(driver: str | None, cuda: str | None, problem: str | None) -> None:
    found = misfit(driver, cuda, "x")
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize(("printed", "driver"), [("535.104.05\n535.104.05\n", "535.104.05"), ("No devices\n", None)])
def test_the_driver_by_nvidia_smi(
    printed: str, driver: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{printed}'\n".replace("\n'", "\\n'"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(install, "DRIVER_FILE", tmp_path / "version")
    assert install.find_driver() == driver
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    assert install.find_driver() == "580.65.06"


def test_the_installed_build_is_torchs(tmp_path: Path) -> None:
    import torch

    cuda = torch.version.cuda
    assert install.installed_build() == ("cpu" if cuda is None else cuda.split(".")[0])
    for line, build in (("'12.6'", "12"), ("'13.0'", "13"), ("None", "cpu")):
        (tmp_path / "version.py").write_text(f"__version__ = '2.14.1'\ncuda: Optional[str] = {line}\nhip = None\n")
        assert install.build_of(tmp_path) == build


@contextmanager
def _index(folder: Path) -> Iterator[str]:
    """Serve an index of packages that has torch."""
    (folder / "torch").mkdir(parents=True)
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the arguments of each call of pip, which is replaced by a program that only writes them down."""
    file, program = tmp_path / "commands.jsonl", tmp_path / "pip.py"
    program.write_text(
        f"import json, sys\nwith open({str(file)!r}, 'a') as file:\n    file.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "sys.exit(7 if 'dev.txt' in ' '.join(sys.argv) else 0)\n"
    )
    monkeypatch.setattr(install, "PIP", (sys.executable, str(program)))
    monkeypatch.setattr(install, "find_driver", lambda: None)
    monkeypatch.setattr(install, "installed_build", lambda: None)
    monkeypatch.setattr(install, "version_of", lambda package: None)
    return file


def pip_calls(file: Path) -> list[str]:
    return [" ".join(json.loads(line)) for line in file.read_text().splitlines()]


def test_cuda_13_comes_from_pypi(commands: Path) -> None:
    install.install(["dali", "wandb"], "13", oldest=False)
    (call,) = pip_calls(commands)
    assert re.findall(r"-r \S*requirements/(\S+)\.txt", call) == ["core", "dali", "wandb"]
    assert re.search(r"-c \S*requirements/lock\.txt", call)
    assert "index" not in call


def test_cuda_12_comes_from_pytorchs_index(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _index(tmp_path / "index") as url:
        monkeypatch.setitem(install.INDEX_OF, "12", url)
        install.install(["dali"], "12", oldest=True)
    torch, rest = pip_calls(commands)
    assert f"--index-url {url} torch torchvision" in torch
    assert "lock-oldest.txt" in torch
    assert re.findall(r"-r \S*requirements/(\S+)\.txt", rest) == ["core", "dali-cuda12"]
    assert "index" not in rest


def test_an_index_that_cannot_be_reached(
    commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for build in ("12", "cpu"):
        monkeypatch.setitem(install.INDEX_OF, build, "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match=r"torch for CUDA 12 .* cannot be reached"):
        install.install([], "12", oldest=False)
    assert not commands.exists()
    install.install([], "cpu", oldest=False)
    assert "taking PyPI's build for CUDA 13" in capsys.readouterr().out
    assert len(pip_calls(commands)) == 1


def test_the_other_build_is_replaced(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed_build", lambda: "12")
    monkeypatch.setattr(install, "version_of", {"nvidia-dali-cuda120": "2.4.0", "torch": "2.14.1+cu126"}.get)
    install.install(["dali"], "13", oldest=False)
    torch, uninstall, rest = pip_calls(commands)
    assert "--force-reinstall --no-deps" in torch
    assert "uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130" in uninstall
    assert "dali.txt" in rest


def test_a_current_build_stays(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (locked,) = re.findall(r"^torch==(.*)$", (ROOT / "requirements/lock.txt").read_text(), re.M)
    monkeypatch.setattr(install, "installed_build", lambda: "12")
    monkeypatch.setattr(install, "version_of", {"torch": f"{locked}+cu126"}.get)
    install.install([], None, oldest=False)
    (call,) = pip_calls(commands)
    assert "torch torchvision" not in call


def test_pips_failure_is_the_commands(commands: Path) -> None:
    with pytest.raises(SystemExit) as error:
        install.install(["dev"], "13", oldest=False)
    assert error.value.code == 7


def test_it_needs_only_the_standard_library() -> None:
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import trainer.ops.install",
    ]
    subprocess.run(command, check=True)


def parse(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


@pytest.mark.parametrize("lock", ["lock.txt", "lock-oldest.txt"])
def test_the_lock_files_fit_the_ranges(lock: str) -> None:
    exact = parse(lock)
    for file in ("core", *install.PARTS, "dali-cuda12"):
        for name, requirement in parse(f"{file}.txt").items():
            (version,) = exact[name].specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), f"{name} in {lock}"
    assert "://" not in (ROOT / "requirements" / lock).read_text()


def test_everything_is_in_requirements_txt_and_an_extra() -> None:
    included = re.findall(r"^-r requirements/(\S+)\.txt", (ROOT / "requirements.txt").read_text(), re.M)
    assert included == ["core", *install.PARTS]
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"] == {"file": ["requirements/core.txt"]}
    extras = {name: [f"requirements/{name}.txt"] for name in (*install.PARTS, "dali-cuda12")}
    assert {name: extra["file"] for name, extra in dynamic["optional-dependencies"].items()} == extras
