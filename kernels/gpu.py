"""The kernels in Triton, for NVIDIA GPUs from sm_80 on: `score` and `adversary_step`.

To be imported through `kernels.implementation("triton")`, which says what is missing where they cannot run.
"""

from kernels.triton_adversary import adversary_step
from kernels.triton_score import score

__all__ = ["adversary_step", "score"]
