"""`hardest` in Triton compiled for sm_80 and sm_90 without a GPU; run by `test_triton.py`."""

import pytest

from trainer.bench.static import ARCHITECTURES, DIMS, SHARED_MEMORY, Job, compile_job

# To keep 64 takes the most registers of what has room; fp16 differs from bf16 in the type alone.
FORMS = [(dim, dtype, 64) for dim in DIMS for dtype in ("bfloat16", "float32")] + [(128, "float16", 16)]


@pytest.mark.parametrize(("dim", "dtype", "kept"), FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fits_the_registers_and_uses_tensor_cores(architecture: int, dim: int, dtype: str, kept: int) -> None:
    row = compile_job(Job("hardest", architecture, dim, dtype, kept=kept))
    print({name: row[name] for name in ("registers", "spilled", "shared", "programs")})
    assert row["spilled"] == row["LDL and STL"] == 0
    assert row["shared"] <= SHARED_MEMORY[architecture]
    assert row["programs"] >= 1
    assert row["HMMA"] + row["HGMMA"] > 0
    if architecture == 90 and dtype != "float32":
        assert row["HGMMA"] > 0
    assert row["LDG.128"] > 0  # the queries
    assert row["LDGSTS.128"] > 0  # the columns, loaded ahead
    assert row["LDGSTS"] == 0
