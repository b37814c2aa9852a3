"""The parts of `bench gpu`, `bench kernels --static` and `--tune` that need no Triton: errors, and the roofline.

The others are tested with the Triton kernels (`tests/kernels/triton_bench.py`, `triton_compiled.py`).
"""

import pytest
import torch
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.bench import gpu
from trainer.plan import roofline
from trainer.plan.hardware import GPUS


@pytest.mark.parametrize("command", [["gpu"], ["kernels", "--tune"]])
def test_without_a_gpu(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = CliRunner().invoke(app, ["bench", *command]).exception
    assert isinstance(error, ValueError)
    assert "got a machine without a CUDA device" in str(error)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="bench gpu: got dtype 'int8', need one of bfloat16, float16, float32"):
        gpu.run(torch.device("cpu"), 128, ("int8",), 1)


def test_static_and_tune_exclude_each_other() -> None:
    error = CliRunner().invoke(app, ["bench", "kernels", "--static", "--tune"]).exception
    assert isinstance(error, ValueError)


def test_roofline() -> None:
    score = roofline.score(GPUS["a100"], 4096, 65536, 128, "bfloat16")
    assert score.flops == 4 * 4096 * (4096 + 65536) * 128
    assert score.seconds == pytest.approx(468e-6, rel=1e-2)
    assert score.limit == "tensor cores"
    few = roofline.adversary(GPUS["h100"], 256, 2**20, 128, "bfloat16")
    assert few.bytes == pytest.approx(2**20 * 128 * (4 + 8 + 8), rel=1e-2)  # n, W and v, read and written
    assert few.limit == "memory"
    assert few.seconds == few.bytes / 3350e9
    low = roofline.adversary(GPUS["h100"], 256, 2**20, 128, "bfloat16", w_bytes=2, v_bytes=0)
    assert low.bytes == pytest.approx(2**20 * 128 * 8, rel=2e-2)
    wide = roofline.score(GPUS["a100"], 4096, 65536, 128, "float32")
    assert wide.tensor_seconds == pytest.approx(6 * score.tensor_seconds)  # three products at half the rate


def test_roofline_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.report(roofline.rows((256,), (65536,), 128, "bfloat16"))
    printed = capsys.readouterr().out
    assert "A100 80 GB" in printed
    assert "H100 SXM" in printed
    assert "tensor cores" in printed
