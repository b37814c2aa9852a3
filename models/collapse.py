"""Whether a run collapses: how far the embeddings spread over the sphere, and over how many directions.

N embeddings of D dimensions, unit rows.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

# Below either the embeddings say nothing of the images: see docs/methods.md for what was seen.
LEAST_STD = 0.05
LEAST_RANK = 1.5


@torch.no_grad()
def spread(z_ND: Tensor) -> dict[str, float]:
    """Of all ranks' rows; called by all ranks, waits for the device.

    feature_std: standard deviation of an element times sqrt(D), 1 where rows are spread evenly over the sphere and 0
    where all are one (SimSiam, arXiv 2011.10566, fig. 2). effective_rank: exp of the entropy of the singular values,
    taken as shares of their sum, from 1 to D (Roy and Vetterli 2007; RankMe, arXiv 2210.02885, eq. 1).
    """
    z_ND = z_ND.double()
    sums = torch.cat([z_ND.T @ z_ND, z_ND.sum(0)[None]])
    dist.all_reduce(sums)
    gram_DD, sum_D = sums[:-1].cpu(), sums[-1].cpu()
    num_rows, dim = len(z_ND) * dist.get_world_size(), z_ND.shape[1]
    variance_D = gram_DD.diagonal() / num_rows - (sum_D / num_rows).square()
    share_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()
    share_D = share_D / share_D.sum()
    return {
        "feature_std": float(variance_D.clamp(min=0).sqrt().mean()) * math.sqrt(dim),
        "effective_rank": math.exp(float(torch.special.entr(share_D).sum())),
    }


def collapse(row: dict[str, float]) -> str | None:
    """What says that the run of this row of metrics has collapsed, None if nothing does."""
    std, rank = row["feature_std"], row["effective_rank"]
    if std < LEAST_STD:
        return f"collapsed: all images have nearly the same embedding (feature_std {std:.3g}, below {LEAST_STD:g})"
    if rank < LEAST_RANK:
        return f"collapsed: embeddings vary in one direction only (effective_rank {rank:.3g}, below {LEAST_RANK:g})"
    return None
