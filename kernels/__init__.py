"""The hot arithmetic of contrastive learning with many negatives (AdCo, arXiv 2011.08435).

Three operators, each one pass over the columns (keys and negatives) without storing an N x K tensor:

- `score`: the partition sums of every query over all columns, at the encoder's and the adversary's temperature, and the
  weighted sum of columns that the encoder's gradient needs.
- `adversary_step`: one step of gradient ascent of the negatives on the contrastive loss, in place.
- `hardest`: the m columns most similar to each query.

`kernels.ops` registers them with torch: a CPU runs `chunked`, an NVIDIA GPU runs `triton`. `reference` is the
specification: its docstrings define the arguments, and the tests compare both implementations with it.

Shape suffixes: N queries, M keys, K negatives, C columns, D dimensions. Queries, keys and unit negatives have unit
length, so every similarity s lies in [-1, 1] and exp(s / T) fits fp32 without a running maximum: partial sums over
tiles, shards and ranks merge by addition.
"""

from kernels.contract import AdversaryParams, AdversaryStats, Hardest, Score, check_temperature
from kernels.ops import adversary_step, hardest, score

__all__ = [
    "AdversaryParams",
    "AdversaryStats",
    "Hardest",
    "Score",
    "adversary_step",
    "check_temperature",
    "hardest",
    "score",
]
