"""The parts of `bench gpu` for the kernels, and `bench kernels --tune`, on the CPU: the kernels run in the interpreter,
and the clock is replaced.

Run by `test_triton.py`. The measured values are not asserted, only that every line runs and is reported.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton.tiles import Key, Tiles, read_table, tiles
from tests.kernels.cases import use_wide_tiles
from trainer.bench import harness, static
from trainer.bench.gpu import kernels as gpu
from trainer.bench.gpu.record import Setting
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


def test_the_triton_kernels_are_checked() -> None:
    lines = [gpu.check_case(CPU, *shape, 32, "float16", "bfloat16", None) for shape in ((1, 1), (17, 100))]
    lines.append(gpu.check_case(CPU, 17, 100, 32, "float32", "float32", "float32"))
    assert [line.verdict for line in lines] == ["passed"] * 3
    assert {"z_N", "o_ND", "za_N", "top_N", "mass_K", "grad_K", "w", "v", "n", "hardest"} == set(lines[2].details)
    assert set(lines[2].details) - set(lines[0].details) == {"v"}


def test_wrong_and_changing_results_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SUMS", 0.0)
    line = gpu.check_case(CPU, 4, 20, 32, "float32", "float32", None)
    assert line.verdict == "failed"
    assert line.note.startswith("of the largest value in fp64: z_N")
    calls: list[None] = []

    def changing(case: Any, implementation: Any) -> Any:
        calls.append(None)
        score = real(case, implementation)
        return score._replace(o_ND=score.o_ND + 1e-7 * len(calls))

    real = gpu.kernel_score
    monkeypatch.setattr(gpu, "kernel_score", changing)
    line = gpu.check_case(CPU, 4, 20, 32, "float32", "float32", None)
    assert (line.verdict, line.note) == ("failed", "repeated with other bits: o_ND")


def test_times_are_compared_with_the_roofline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = read_table()
    use_wide_tiles(table)
    monkeypatch.setattr("kernels.triton.tiles.TABLE", table)
    monkeypatch.setattr(gpu, "known_gpu", lambda _: GPUS["a100"])
    monkeypatch.setattr(gpu, "_measure", lambda action, device: gpu.measure_gpu(action, 1))
    lines = list(gpu.check_speed(Setting(CPU, tmp_path)))
    assert [line.verdict for line in lines[:2]] == ["slow", "slow"]
    least = roofline.score(GPUS["a100"], 8, 256, 128, "float32").seconds
    assert lines[0].note.startswith(f"of the roofline, {1e3 * least:.3f} ms")
    assert lines[2].note == "times as fast as published"
    sides: Any = lines[2].details
    assert {name: x["bytes"] for name, x in sides.items()} == dict.fromkeys(("published", "compiled", "ours"), 2**20)

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "materialised_step", out_of_memory)
    assert [line.note for line in list(gpu.check_speed(Setting(CPU, tmp_path)))[2:]] == [
        "published: out of memory",
        "compiled: out of memory",
    ]


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
