"""The Triton kernels compiled for sm_80 and sm_90 without a GPU, as `bench kernels --static` does; run by
`test_triton.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.triton.tiles import tiles
from trainer.bench import static
from trainer.bench.static import Job

TABLED = static.jobs()
SPILLING = Job("adversary", 80, 128, "bfloat16", "float32", "float32", tile=(128, 128, 4, 2))


@pytest.fixture(scope="module")
def compiled() -> dict[Job, dict[str, Any]]:
    jobs = [*TABLED, SPILLING]
    return dict(zip(jobs, static.run(jobs), strict=True))


@pytest.mark.parametrize("job", TABLED, ids=lambda job: "-".join(str(x) for x in job if x is not None))
def test_fits_and_uses_the_hardware(job: Job, compiled: dict[Job, dict[str, Any]]) -> None:
    row = compiled[job]
    assert row["spilled"] == row["LDL and STL"] == 0
    assert row["registers"] <= 255
    assert row["shared"] <= static.SHARED_MEMORY[job.architecture]
    assert row["programs"] >= 1
    if job.architecture == 80:
        assert row["shared"] <= static.SHARED_MEMORY_OF_SMALL  # these tiles also serve sm_86, sm_89 and sm_120
    weighted = 0 if job.kernel == "hardest" else 1
    limit = 128 if weighted else 256  # of fp32 on tensor cores, see `tiles.products`
    if job.dtype != "float32" or job.dim <= limit:
        assert row["HMMA"] + row["HGMMA"] > 0
    narrow = job.dim == 512 and weighted  # tiles of 32 rows, for the registers: too few for HGMMA and for the warps
    if job.architecture == 90 and job.dtype != "float32" and row["rows"] >= 64:
        assert row["HMMA"] == 0
    assert row["LDG.128"] + row["LDGSTS.128"] > 0
    if job.dtype != "float32":
        assert row["LDGSTS.128"] > 0  # rows are loaded ahead
    # One exponential serves two temperatures with ratio 6; `score` has a loop over keys and one over negatives.
    loops = 2 if job.kernel == "score" and job.variant != "one matrix" else 1
    elements = loops * row["rows"] * row["columns"] // (32 * row["warps"])
    exponentials = 2 if job.variant == "other temperatures" else 1
    if narrow and job.dtype != "float32":
        exponentials = 2  # two warps compute the same ones
    assert row["MUFU.EX2"] == (exponentials * elements if weighted else 0)
    if job.dtype != "float32":
        assert row["WARPGROUP.ARRIVE"] in (0, loops * (1 + weighted))  # products do not wait for each other


def test_spills_are_seen(compiled: dict[Job, dict[str, Any]]) -> None:
    assert compiled[SPILLING]["spilled"] > 0
    assert compiled[SPILLING]["LDL and STL"] > 0


def test_report(compiled: dict[Job, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "static.csv"
    static.report([compiled[job] for job in TABLED], out)
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + len(TABLED)
    assert lines[0].startswith("kernel,architecture,dim,dtype,weights,velocity")
    printed = capsys.readouterr().out
    assert "sm_80" in printed
    assert "sm_90" in printed


def test_what_is_compiled_is_what_is_in_the_table(compiled: dict[Job, dict[str, Any]]) -> None:
    row = compiled[Job("score", 80, 128, "bfloat16")]
    tile = tiles("score", 80, 128, torch.bfloat16)
    assert (row["rows"], row["columns"], row["warps"], row["stages"]) == tile
