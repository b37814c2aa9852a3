"""Without an optional package, what needs it says in one line how to install it, and everything else works."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.extras import optional_import, requirement_file
from tests.trainer.small import small_config, write_images
from trainer.config import Config
from trainer.interop.export import write_onnx
from trainer.pretrain import pretrain
from trainer.run.trackers import tracker_factories

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package and its modules impossible to import, as if it were not installed."""

    def hide(package: str) -> None:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return hide


def changed(folder: Path, **sections: Any) -> Config:
    values = small_config(folder / "run", write_images(folder / "images"), run={"epochs": 1}).model_dump()
    return Config.model_validate(values | {name: values[name] | sections[name] for name in sections})


def test_dali(hide: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(tmp_path, data={"backend": "dali"})
    hide("nvidia.dali")
    hide("data.dali")
    monkeypatch.delitem(sys.modules, "data.dali")
    monkeypatch.delattr("data.dali", raising=False)
    with pytest.raises(ValueError, match=r"^data\.backend=dali needs nvidia\.dali, .*: pip install -r \S+/dali\.txt$"):
        pretrain(config)


def test_deepspeed(hide: Callable[[str], None], tmp_path: Path) -> None:
    config = changed(tmp_path)
    config = config.model_copy(
        update={"engine": Config.model_validate(config.model_dump() | {"engine": {"kind": "deepspeed"}}).engine}
    )
    hide("deepspeed")
    with pytest.raises(ValueError, match=r"^engine\.kind=deepspeed needs deepspeed, .*install -r \S+/deepspeed\.txt$"):
        pretrain(config)


def test_wandb(hide: Callable[[str], None], tmp_path: Path) -> None:
    config = changed(tmp_path, monitor={"wandb": "project"})
    hide("wandb")
    with pytest.raises(ValueError, match=r"^monitor\.wandb needs wandb, .*: pip install -r requirements/wandb\.txt$"):
        pretrain(config)
    others = config.monitor.model_copy(update={"wandb": None})
    for make_tracker in tracker_factories(others, tmp_path, tmp_path, 0).values():
        make_tracker().close()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx(package: str, hide: Callable[[str], None], tmp_path: Path) -> None:
    hide(package)
    export: Any = None  # the packages are imported first
    with pytest.raises(ValueError, match=rf"^--format onnx needs {package}, .*: pip install -r \S+/export\.txt$"):
        write_onnx(export, tmp_path / "x.onnx")


def test_a_package_that_is_broken_shows_its_own_error() -> None:
    with pytest.raises(ImportError, match=r"libcuda\.so\.1: cannot open"), optional_import("dali", "data.backend=dali"):
        raise ImportError("libcuda.so.1: cannot open shared object file")


def test_dali_has_a_file_for_each_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, file in (("12.6", "dali-cuda12"), ("13.0", "dali"), (None, "dali")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert requirement_file("dali") == f"requirements/{file}.txt"
        assert requirement_file("wandb") == "requirements/wandb.txt"
    assert all((ROOT / f"requirements/{name}.txt").exists() for name in ("dali", "dali-cuda12"))


def test_the_core_imports_no_optional_package() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['nvidia.dali', 'deepspeed', 'onnx', 'onnxruntime', 'onnxscript', "
        "'wandb', 'pytest', 'triton']); import trainer.__main__, trainer.pretrain, trainer.report.run, "
        "trainer.report.compare, trainer.interop.export, trainer.evaluate.run, trainer.plan.planner, trainer.ops.doctor"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
