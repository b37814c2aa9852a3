"""The checks of doctor, of this machine and of configurations."""

from pathlib import Path

import pytest
import torch

from tests.data.images import write_folder
from trainer.config import Config
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
    assert names == ["CPU", *gpus, "NCCL", "DALI", "Triton", "DeepSpeed", "timm", "SLURM", "disk"]
    assert len(gpus) == max(1, torch.cuda.device_count())
    states = {check.name: check.state for check in run_checks(None)}
    assert states["CPU"] == states["timm"] == "ok"
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
