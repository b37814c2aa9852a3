"""The benchmark of the kernels measures two implementations that agree; times are not asserted."""

import json
from pathlib import Path

import pytest
import torch

from kernels import chunked
from trainer.bench import kernels

KEYS = {"impl", "N", "K", "D", "dtype", "seconds_median", "peak_bytes", "speedup"}


def test_rows() -> None:
    rows = kernels.run(32, 500, 16, "float64", repeats=2)
    assert [row["impl"] for row in rows] == ["materialised", "chunked"]
    for row in rows:
        assert row.keys() == KEYS
        assert (row["N"], row["K"], row["D"], row["dtype"]) == (32, 500, 16, "float64")
        assert row["seconds_median"] > 0
        assert row["speedup"] == pytest.approx(rows[0]["seconds_median"] / row["seconds_median"])


def test_chunked_holds_far_less_memory() -> None:
    materialised, ours = kernels.run(256, 32768, 32, "float32", repeats=1)
    logits = 4 * 256 * 32768
    assert materialised["peak_bytes"] > 4 * logits
    assert ours["peak_bytes"] < logits
    assert materialised["peak_bytes"] > 20 * ours["peak_bytes"]


def test_implementations_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_LOG2_E", 1.44)
    with pytest.raises(RuntimeError, match=r"chunked and materialised differ in loss by \d\.\de-0\d of the largest"):
        kernels.run(32, 500, 16, "float32", repeats=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "int64", "fp32"])
def test_other_types_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"bench kernels: got dtype '{dtype}', need float32 or float64"):
        kernels.run(32, 500, 16, dtype, repeats=1)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"impl": impl, "N": 8, "K": 64, "D": 16, "dtype": "float32", "seconds_median": s, "peak_bytes": b, "speedup": r}
        for impl, s, b, r in (("materialised", 1.0, 2**22, 1.0), ("chunked", 0.25, 2**20, 4.0))
    ]
    out = tmp_path / "kernels.json"
    kernels.report(rows, out)
    written = json.loads(out.read_text())
    assert written["rows"] == rows
    assert written["machine"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "4.00x" in printed
    assert "4.0 MiB" in printed


def test_report_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.report(kernels.run(8, 64, 16, "float32", repeats=1), None)
    assert "materialised" in capsys.readouterr().out
