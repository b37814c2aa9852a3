"""The tests of contrastive loss and bank with the Triton kernels, in Triton's interpreter.

The interpreter must be chosen before the kernels are imported, so the tests run in a pytest process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tests", "chosen"),
    [
        ("golden", "asym"),
        pytest.param("golden", "not asym", marks=pytest.mark.slow),
        pytest.param("contrast", "", marks=pytest.mark.slow),
    ],
)
def test_with_triton(tests: str, chosen: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/models/test_{tests}.py", "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
