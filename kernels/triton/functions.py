"""The three Triton kernels under the names that every implementation has.

Imported through `kernels.implementation("triton")`, which reports why they cannot run on a machine without a GPU.
"""

from kernels.triton.adversary import adversary_step
from kernels.triton.hardest import hardest
from kernels.triton.score import score

__all__ = ["adversary_step", "hardest", "score"]
