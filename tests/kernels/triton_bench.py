"""The parts of `bench gpu` for the kernels, and `bench kernels --tune`, on the CPU: the kernels run in the interpreter,
and the clock is replaced.

Run by `test_triton.py`. The measured values are not asserted, only that every line runs and is reported.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton import tiles as tiles_module
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


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The table that `tune` writes, for one dimension and type. Candidates take 512 bytes of shared memory a row,
    and as long as they have rows.
    """
    monkeypatch.setattr(static, "DIMS", (32,))
    monkeypatch.setattr(static, "DTYPES", ("float16",))
    monkeypatch.setattr("kernels.triton.tiles.TABLE", read_table())
    monkeypatch.setattr("kernels.triton.tiles.TABLE_PATH", tmp_path / "tiles.csv")
    monkeypatch.setattr(
        static,
        "run",
        lambda jobs, _: [{"spilled": 8 * (j.tile[0] == 64), "programs": 1, "shared": 512 * j.tile[0]} for j in jobs],
    )
    monkeypatch.setattr(gpu, "_shared_memory", lambda _: 100 * 1024)
    real = gpu.measure_gpu

    def measure(action: Any, repeats: int) -> tuple[float, int]:
        rows = tiles(action.func.__name__.removeprefix("_"), 80, 32, torch.float16).rows
        return real(action, repeats)[1] * float(rows), 0

    monkeypatch.setattr(gpu, "measure_gpu", measure)
    return tmp_path / "tiles.csv"


def set_tiles(monkeypatch: pytest.MonkeyPatch, shipped: Tiles, candidates: list[Tiles]) -> None:
    monkeypatch.setattr(gpu, "CANDIDATES", candidates)
    for kernel in KERNELS:
        monkeypatch.setitem(tiles_module.TABLE, Key(kernel, 80, "float16", 32), shipped)


KERNELS = ("score", "adversary", "hardest")


def test_tune(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate spills, the second is slower than the third, and the fourth needs too much shared memory."""
    set_tiles(monkeypatch, Tiles(32, 32, 4, 2), [Tiles(rows, 64, 4, 2) for rows in (64, 32, 16, 256)])
    before = dict(tiles_module.TABLE)
    found = gpu.tune(CPU, 1, shape=(17, 100))
    assert [(row["kernel"], row["tried"], row["tile"]) for row in found] == [
        (name, 3, Tiles(16, 64, 4, 2)) for name in KERNELS
    ]
    after = read_table(tuned)
    changed = {key for key in before if after[key] != before[key]}
    assert changed == {Key(name, 80, "float16", 32) for name in KERNELS}
    assert after.keys() == before.keys()


@pytest.mark.parametrize("rows", [16, 64], ids=["it fits", "it spills, as some tiles of the table do"])
def test_tune_keeps_a_shipped_tile_that_is_the_fastest(tuned: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    shipped = Tiles(rows, 64, 4, 2)
    set_tiles(monkeypatch, shipped, [Tiles(128, 64, 4, 2), shipped])
    found = gpu.tune(CPU, 1, shape=(17, 100))
    assert [(row["tried"], row["tile"]) for row in found] == [(2, shipped)] * 3


def test_tune_keeps_the_shipped_tile_if_nothing_fits(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = Tiles(256, 64, 4, 2)
    set_tiles(monkeypatch, shipped, [Tiles(64, 64, 4, 2)])
    before = dict(tiles_module.TABLE)
    assert [(row["tried"], row["tile"], row["seconds"]) for row in gpu.tune(CPU, 1, shape=(17, 100))] == [
        (0, shipped, None)
    ] * 3
    assert before == tiles_module.TABLE
    assert "score float16 D = 32: no tile fits, the table keeps" in capsys.readouterr().out
