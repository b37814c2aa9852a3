"""The kernels in Triton, for NVIDIA GPUs from sm_80 on: `score`, `adversary_step` and `hardest`.

To be imported through `kernels.implementation("triton")`, which says what is missing where they cannot run.
"""

from kernels.triton_adversary import adversary_step
from kernels.triton_mining import hardest
from kernels.triton_score import score

__all__ = ["adversary_step", "hardest", "score"]
