"""Signs of a collapsed run: how far embeddings spread over the sphere, and over how many directions.

Shape suffixes: N embeddings (unit rows) of D dimensions.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

# Below either, embeddings carry no information about the images; docs/methods.md reports observed values.
MIN_STD = 0.05
MIN_RANK = 1.5


@torch.no_grad()
def embedding_spread(z_ND: Tensor) -> dict[str, float]:
    """Measure the spread of the rows of all ranks. Waits for the device; called by all ranks.

    Returns:
        A dictionary: feature_std, the standard deviation of an element times sqrt(D), is 1 for rows spread evenly over
        the sphere and 0 for equal rows (SimSiam, arXiv 2011.10566, fig. 2). effective_rank, from 1 to D, is exp of the
        entropy of the singular values divided by their sum (Roy and Vetterli 2007; RankMe, arXiv 2210.02885, eq. 1).
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


def describe_collapse(row: dict[str, float]) -> str | None:
    """Return why a run with these metrics has collapsed, or None if it has not."""
    std, rank = row["feature_std"], row["effective_rank"]
    if std < MIN_STD:
        return f"collapsed: all images have nearly the same embedding (feature_std {std:.3g}, below {MIN_STD:g})"
    if rank < MIN_RANK:
        return f"collapsed: embeddings vary in one direction only (effective_rank {rank:.3g}, below {MIN_RANK:g})"
    return None
