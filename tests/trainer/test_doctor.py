"""The checks of doctor, of this machine and of configurations."""

import sys
from pathlib import Path

import pytest
import torch

from tests.data.images import write_folder
from trainer.config import Config
from trainer.ops import doctor
from trainer.ops.doctor import Check, print_checks, run_checks


def make_config(folder: Path, train: Path, **sections: dict[str, object]) -> Config:
    values = {"run": {"dir": str(folder), "epochs": 1}, "data": {"train": str(train), "workers": 0}}
    return Config.model_validate({name: values[name] | sections.get(name, {}) for name in values})


def needs(config: Config) -> dict[str, Check]:
    machine = {check.name for check in run_checks(None)}
    return {check.name: check for check in run_checks(config) if check.name not in machine}


def test_the_machine() -> None:
    names = [check.name for check in run_checks(None)]
    gpus = [name for name in names if name.startswith("GPU")]
    extras = ["Triton", "DALI", "DeepSpeed", "ONNX export", "W&B", "tests, lint"]
    assert names == ["CPU", *gpus, "driver", "NCCL", *extras, "SLURM", "open files", "disk"]
    assert len(gpus) == max(1, torch.cuda.device_count())
    states = {check.name: check.state for check in run_checks(None)}
    assert {states[name] for name in ("CPU", *extras)} == {"ok"}
    assert set(states.values()) <= {"ok", "absent", "missing"}


def test_a_configuration_that_fits(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pictures")
    found = needs(make_config(tmp_path / "runs" / "x", pictures, data={"val": str(pictures)}))
    assert list(found) == ["data.train", "/dev/shm", "data.val", "run.dir"]
    assert found["data.train"] == Check("data.train", "ok", f"24 images in 3 classes at {pictures}")
    assert str(tmp_path) in found["run.dir"].detail
    assert not (tmp_path / "runs").exists()  # doctor creates nothing
    assert not list(pictures.glob("*.npz"))


def test_a_configuration_whose_data_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    config = make_config(tmp_path, tmp_path / "nowhere", data={"val": str(tmp_path / "empty")})
    found = needs(config)
    assert (found["data.train"].state, found["data.val"].state) == ("missing", "missing")
    assert "does not exist" in found["data.train"].detail
    assert not print_checks(list(found.values()))
    shown = capsys.readouterr().out
    assert "data.train" in shown
    assert "missing" in shown


def test_more_than_this_machine_has(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pictures", classes=1, per_class=1)
    found = needs(make_config(tmp_path, pictures, data={"workers": 10_000}, run={"device": "cuda"}))
    assert found["data.workers"].state == "absent"
    assert ("run.device" in found) == (not torch.cuda.is_available())


def test_what_is_absent_is_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_checks([Check("a", "ok", "here"), Check("b", "absent", "not here")])
    assert not print_checks([Check("a", "ok", "here"), Check("c", "missing", "a [/path] with [red] brackets [.gz]")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "c missing a [/path] with [red] brackets [.gz]" in shown


NO_EXTRA = "pip install -r requirements/{}.txt installs it"


@pytest.mark.parametrize(
    ("module", "name", "settings", "key", "file"),
    [
        ("nvidia.dali", "DALI", {"data": {"backend": "dali"}}, "data.backend", "dali"),
        ("deepspeed", "DeepSpeed", {"engine": {"kind": "deepspeed"}}, "engine.kind", "deepspeed"),
        ("wandb", "W&B", {"monitor": {"wandb": "project"}}, "monitor.wandb", "wandb"),
    ],
)
def test_an_optional_package_that_a_configuration_needs(
    module: str,
    name: str,
    settings: dict[str, dict[str, object]],
    key: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    checks = {check.name: check for check in run_checks(None)}
    assert checks[name] == Check(name, "absent", NO_EXTRA.format(file))
    pictures = write_folder(tmp_path / "pictures", classes=1, per_class=1)
    config = make_config(tmp_path, pictures)
    values = config.model_dump() | {"engine": {}} if "engine" in settings else config.model_dump()
    for section, changes in settings.items():
        values[section] = values[section] | changes
    assert needs(Config.model_validate(values))[key] == Check(key, "missing", f"{name}: {NO_EXTRA.format(file)}")
    monkeypatch.undo()
    assert key not in needs(Config.model_validate(values))


@pytest.mark.parametrize(
    ("driver", "cuda", "dali", "state", "text"),
    [
        (None, "13.0", ["nvidia-dali-cuda130"], "absent", "none; torch 2.14.1 for CUDA 13.0"),
        (
            "580.65.06",
            "13.0",
            ["nvidia-dali-cuda130"],
            "ok",
            "580.65.06, which runs CUDA 13; torch 2.14.1 for CUDA 13.0",
        ),
        (
            "535.104.05",
            "12.6",
            ["nvidia-dali-cuda120"],
            "ok",
            "535.104.05, which runs CUDA 12; torch 2.14.1 for CUDA 12.6",
        ),
        ("535.104.05", "13.0", [], "missing", "make venv CUDA=12, or a driver 580 or newer"),
        ("535.104.05", "12.6", ["nvidia-dali-cuda130"], "missing", "nvidia-dali-cuda130 is built for CUDA 13"),
        ("580.65.06", None, [], "missing", "built for CPUs, but there is a GPU driver, 580.65.06: make venv CUDA=13"),
        (None, "13.0", ["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "absent", "none"),
        ("580.1", "13.0", ["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "missing", "overwrite each other"),
    ],
)
def test_driver_and_builds(
    driver: str | None, cuda: str | None, dali: list[str], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    monkeypatch.setattr(doctor, "version_of", lambda package: "2.4.0" if package in dali else None)
    (check,) = (check for check in run_checks(None) if check.name == "driver")
    assert check.state == state
    assert text in check.detail
    assert (doctor.driver_problem() is None) == (state != "missing")
