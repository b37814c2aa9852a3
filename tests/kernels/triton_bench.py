"""`bench gpu` and `bench kernels --tune` on the CPU: the kernels run in the interpreter, the clock is replaced.

Run by `test_triton.py`. The measured values are not asserted, only that every line runs and is reported.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton.tiles import Key, Tiles, read_table, tiles
from trainer.bench import gpu, harness, static
from trainer.plan import roofline
from trainer.plan.hardware import GPUS

CPU = torch.device("cpu")


def do_bench(action: Any, rep: float, return_mode: str) -> float:
    assert rep > 0
    assert return_mode == "median"
    return 1e3 * harness.seconds(action, CPU)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20 + 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = gpu.run(CPU, 32, ("float16",), 1, shapes=((17, 100),), checked=(17, 100))
    assert all(row["ok"] for row in result["checks"])
    assert {row["name"] for row in result["checks"]} >= {
        "z_N",
        "o_ND",
        "za_N",
        "top_N",
        "mass_K",
        "grad_K",
        "w",
        "v",
        "n",
    }
    assert [row["impl"] for row in result["steps"][:3]] == ["materialised", "torch.compile", "triton"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] == 2**20 for row in result["steps"])
    assert result["steps"][0]["speedup"] == 1
    least = roofline.score(GPUS["a100"], 17, 100, 32, "float16").seconds  # the interpreter counts as sm_80
    assert result["kernels"][0]["share"] == pytest.approx(least / result["kernels"][0]["seconds"])
    out = tmp_path / "gpu.json"
    assert gpu.report(result, out)
    assert json.loads(out.read_text()) == result
    assert "torch.compile" in capsys.readouterr().out


def test_wrong_results_and_too_little_memory_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "materialised_step", out_of_memory)
    monkeypatch.setattr(gpu, "_SUMS", 0.0)
    monkeypatch.setattr(roofline, "BY_CAPABILITY", {})
    result = gpu.run(CPU, 32, ("float32",), 1, shapes=((4, 20),), checked=(4, 20))
    assert not gpu.report(result, None)
    assert [row["seconds"] is None for row in result["steps"]] == [True, True, False]
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert "wrong" in printed


def test_tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first candidate does not fit, the second is slower than the third."""
    candidates = [(64, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2)]
    monkeypatch.setattr(gpu, "CANDIDATES", candidates)
    monkeypatch.setattr(static, "DIMS", (32,))
    monkeypatch.setattr(static, "DTYPES", ("float16",))
    monkeypatch.setattr(
        static, "run", lambda jobs, _: [{"spilled": 8 * (j.tile[0] == 64), "programs": 1} for j in jobs]
    )
    monkeypatch.setattr("kernels.triton.tiles.TABLE", before := read_table())
    monkeypatch.setattr("kernels.triton.tiles.TABLE_PATH", tmp_path / "tiles.csv")
    real, before = gpu.measure_gpu, dict(before)

    def measure(action: Any, repeats: int) -> tuple[float, int]:
        rows = tiles(action.func.__name__.removeprefix("_"), 80, 32, torch.float16).rows
        return real(action, repeats)[1] * float(rows), 0

    monkeypatch.setattr(gpu, "measure_gpu", measure)
    found = gpu.tune(CPU, 1, shape=(17, 100))
    assert [(row["kernel"], row["tried"], row["tile"]) for row in found] == [
        (name, 2, Tiles(16, 64, 4, 2)) for name in ("score", "adversary", "hardest")
    ]
    after = read_table(tmp_path / "tiles.csv")
    changed = {key for key in before if after[key] != before[key]}
    assert changed == {Key(name, 80, "float16", 32) for name in ("score", "adversary", "hardest")}
    assert after.keys() == before.keys()
