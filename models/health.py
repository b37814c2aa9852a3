"""Signs that a run does not learn, measured on its embeddings and its negatives, and what to change then.

Shape suffixes: N embeddings (unit rows) of D dimensions.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# Below either, embeddings carry no information about the images; docs/methods.md reports observed values.
MIN_STD = 0.05
MIN_RANK = 1.5
# docs/troubleshooting.md explains these.
MIN_GRADIENT = 1e-9  # 1e-6 to 1e-3 in runs that learn, below 1e-11 where the negatives have no weight
MAX_SHARE = 0.97
MIN_NORM = 0.01  # and its inverse; rows start with norm 1
MAX_PRETEXT = 0.95
LASTING = 3  # rows of the log


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
    return {
        "feature_std": float(variance_D.clamp(min=0).sqrt().mean()) * math.sqrt(dim),
        "effective_rank": _rank_of(torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt()),
    }


@torch.no_grad()
def effective_rank(x_ND: Tensor) -> float:
    """Return the effective rank of this rank's rows, see `embedding_spread`."""
    return _rank_of(torch.linalg.svdvals(x_ND.double()).cpu())


def _rank_of(singular_values: Tensor) -> float:
    return math.exp(float(torch.special.entr(singular_values / singular_values.sum()).sum()))


class HealthCheck:
    """Finds signs that a run does not learn in the rows of its log, and names each of them once.

    A collapse is named at once, any other sign after it lasted for three rows.
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}  # the rows for which each sign has lasted
        self.named: set[str] = set()

    def new_signs(self, row: Mapping[str, float]) -> list[str]:
        """Return a sentence for each sign that is new; each says what was measured and what to change."""
        found = _find_signs(row)
        self.rows = {name: self.rows.get(name, 0) + 1 for name in found}
        new = [name for name, rows in self.rows.items() if name == "collapse" or rows >= LASTING]
        new = [name for name in new if name not in self.named]
        self.named.update(new)
        return [found[name] for name in new]


def _find_signs(row: Mapping[str, float]) -> dict[str, str]:
    """Return the sentences about a row by the name of their sign. Columns may be missing."""
    signs = {}
    if collapse := describe_collapse(row):
        signs["collapse"] = collapse
    if row.get("adversary_grad_norm", 1) < MIN_GRADIENT:
        signs["no weight"] = (
            f"the negatives have no weight and do not move (adversary_grad_norm {row['adversary_grad_norm']:.2g}): "
            "start from bank.init=keys, or raise bank.temperature and lower bank.lr, such as to 0.1 and 0.3"
        )
    if row.get("bank_share", 0) > MAX_SHARE:
        signs["equal weight"] = (
            f"all negatives carry the same weight (bank_share {row['bank_share']:.3f}): "
            "lower bank.lr, or let it fall with bank.lr_final"
        )
    if not MIN_NORM < row.get("bank_norm", 1) < 1 / MIN_NORM:
        signs["norm"] = (
            f"the negatives' weights have drifted from norm 1 to {row['bank_norm']:.2g}, which changes the size of "
            "their steps: lower bank.weight_decay if they shrink, bank.lr if they grow"
        )
    if row.get("pretext_top1", 0) > MAX_PRETEXT:
        signs["too easy"] = (
            f"the negatives are too easy (pretext_top1 {row['pretext_top1']:.1%}): change bank.temperature, then "
            "bank.lr if they are learned; otherwise take more of them, or a stronger augmentation"
        )
    return signs


def describe_collapse(row: Mapping[str, float]) -> str | None:
    """Return why a run with these metrics has collapsed, or None if it has not."""
    std, rank = row.get("feature_std", 1.0), row.get("effective_rank", math.inf)
    if std < MIN_STD:
        cause = f"all images have nearly the same embedding (feature_std {std:.3g}, below {MIN_STD:g})"
    elif rank < MIN_RANK:
        cause = f"embeddings vary in one direction only (effective_rank {rank:.3g}, below {MIN_RANK:g})"
    else:
        return None
    return f"collapsed: {cause}: lower optim.lr; byol and acssl need model.predictor and a high method.teacher_momentum"
