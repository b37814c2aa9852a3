"""The Triton kernels: their arithmetic in Triton's interpreter, and their compiled code for GPUs.

The interpreter must be chosen before the kernels are imported, cannot be switched off again, and prevents compilation.
Each file of checks therefore runs in a pytest process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("checks", "interpret"),
    [
        pytest.param("interpreted", "1", marks=pytest.mark.slow),
        pytest.param("compiled", "0", marks=pytest.mark.slow),
        pytest.param("bench", "1", marks=pytest.mark.slow),
        pytest.param("mining_interpreted", "1", marks=pytest.mark.slow),
    ],
)
def test_in_its_own_process(checks: str, interpret: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/kernels/triton_{checks}.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
