"""CaCo (arXiv 2203.14370): both positives and negatives are learned rows of one bank.

The teacher's key only chooses a query's positive, the bank row most similar to it. All other rows are the query's
negatives. The student descends on the contrastive loss, the negatives ascend on it (adversarial), and the positives
descend on it (cooperative).

Source of the details: the authors' code, github.com/maple-research-lab/CaCo, training/train_caco.py.

Shape suffixes: B images of this rank, S ranks in this rank's row of the grid, A = S * N queries, K rows of the bank in
this shard, D dimensions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

import kernels
from kernels.rounding import round_to_bf16, row_bits
from models import method
from models.compat import reduce_scatter_single
from models.encoder import Encoder
from models.method import Method, StepOutput, Views, queries_for_key
from models.negatives.bank import Bank, BankUpdate
from models.negatives.base import BankSettings, Negatives, gather
from models.negatives.contrast import contrast

_ROWS = 1024  # queries that are compared with all others at a time


class Settings(method.Settings):
    """Settings of CaCo; section `bank` configures the rows that are positives and negatives."""

    papers: ClassVar[tuple[str, ...]] = ("2203.14370",)

    name: Literal["caco"] = Field("caco", description="CaCo (arXiv 2203.14370), AdCo with learned positives.")
    temperature: float = Field(
        0.08, gt=0, description="Temperature of the encoder's loss; bank.temperature is that of the bank's step."
    )
    directions: Literal["sum", "mean"] = Field(
        "sum",
        description=(
            "How the losses of view 0 against key 1 and view 1 against key 0 are combined: sum for two views, mean "
            "for multi-crop (the published code). The mean loss of all small views is added."
        ),
    )
    teacher_momentum: method.TeacherMomentum = 0.99
    teacher_momentum_final: method.FinalMomentum = 1.0
    bn: method.BatchNorm = "sync"

    @property
    def negatives_class(self) -> type[Negatives]:
        """A bank whose rows are positives, too."""
        return CooperativeBank

    def check(self, batch_size: int, num_views: int, bank: BankSettings) -> None:
        """Check that the sums of exponentials fit fp32."""
        method.check_temperature("method.temperature", self.temperature, bank.size)
        method.check_temperature("bank.temperature", bank.temperature, bank.size)

    def make(self, student: Encoder, negatives: Negatives | None) -> "CaCo":
        """Build CaCo."""
        return CaCo(student, self, negatives)


class CaCo(Method):
    """The contrastive loss of each query against the bank, with the row most similar to the key as its positive."""

    settings: Settings

    def loss(self, queries: Views, keys: Views) -> StepOutput:
        """Compute the loss over all pairs of a query and a key of another view of its image."""
        bank, temperature = self.negatives, self.settings.temperature
        assert isinstance(bank, CooperativeBank)
        losses, updates, positives, hardest, distinct = [], [], [], [], []
        for j, k_BD in keys.items():
            q_ND = queries_for_key(queries, j)
            weight_N = self._weights(queries, j, q_ND)
            row_SB, n_BD = bank.nearest(k_BD)
            row_A = row_SB.view(-1, 1, len(k_BD)).expand(-1, len(q_ND) // len(k_BD), -1).reshape(-1)
            result = contrast(q_ND, n_BD, bank, temperature, False, row_A)
            losses.append((result.loss_N * weight_N).sum())
            weight_A = weight_N.repeat(len(row_A) // len(weight_N)) / dist.get_world_size()
            updates.append(CooperativeUpdate(result.queries_ND, weight_A / result.za_N, weight_A, row_A))
            positives.append(result.positive_N)
            hardest.append(result.hardest_N)
            distinct.append((row_SB.sort().values.diff() > 0).sum() + 1)
        loss = torch.stack(losses).sum()
        metrics = method.similarity_metrics(loss, torch.cat(positives), torch.cat(hardest))
        metrics["distinct_positives"] = torch.stack(distinct).float().mean() / len(row_SB)
        return StepOutput(loss, metrics, updates)

    def _weights(self, queries: Views, j: int, q_ND: Tensor) -> Tensor:
        """Return the weight [N] of each query's loss with key view j."""
        large = 0.5 if self.settings.directions == "mean" else 1.0
        small = 0.5 / max(1, len(queries) - len(self.key_views))
        batch = len(queries[j])
        weights = [large if i in self.key_views else small for i in queries if i != j]
        return torch.cat([q_ND.new_full((batch,), weight / batch) for weight in weights])


class CooperativeUpdate(NamedTuple):
    """The input of the bank's step from A queries, those of one row of the grid of ranks.

    Attributes:
        q_AD: Unit queries, of the dtype of the bank's unit rows.
        coef_A: Each query's weight over its partition sum at the bank's temperature.
        weight_A: Each query's weight in the loss.
        row_A: Index of each query's positive in the whole bank, int64.
    """

    q_AD: Tensor
    coef_A: Tensor
    weight_A: Tensor
    row_A: Tensor


class CooperativeBank(Bank):
    """A bank whose rows ascend on the loss of the queries they are negatives of and descend on that of the others.

    With p_ik = exp(q_i . n_k / T_a) / Z^a_i, AdCo's step has the gradient sum_i w_i p_ik q_i for row k. CaCo's has
    1 - p_ik in place of p_ik where row k is the positive of query i. The difference, sum_i w_i (1 - 2 p_ik) q_i over
    these queries, concerns at most A rows, so it is added to them after AdCo's step.
    """

    products = 4  # those of the bank, and the keys' similarities

    @torch.no_grad()
    def nearest(self, k_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Find the row most similar to each key. Called by all ranks.

        Args:
            k_BD: Unit keys.

        Returns:
            The rows' indices in the whole bank, int64 [S * B], for the keys of all ranks in this rank's row of the
            grid; and the rows [B, D] of this rank's own keys.
        """
        row = self.mesh.get_group("shard")
        k_SBD = gather(k_BD.to(self.n_KD.dtype), row)
        found = kernels.hardest(k_SBD, self.n_KD, None, 1)
        best_SB, index_SB = found.similarity_Nm[:, 0].clone(), found.column_Nm[:, 0] + self.first
        dist.all_reduce(best_SB, dist.ReduceOp.MAX, group=row)
        # Among equally similar rows of several ranks, the first one is taken.
        index_SB = index_SB.where(found.similarity_Nm[:, 0] == best_SB, self.size)
        dist.all_reduce(index_SB, dist.ReduceOp.MIN, group=row)
        local_SB, is_local_SB = self._local(index_SB)
        n_SBD = self.n_KD[local_SB] * is_local_SB[:, None]
        if row.size() == 1:
            return index_SB, n_SBD
        n_BD = torch.empty_like(k_BD, dtype=n_SBD.dtype)
        reduce_scatter_single(n_BD, n_SBD, group=row)
        return index_SB, n_BD

    def _gather_updates(self, updates: Sequence[Sequence[Any]]) -> CooperativeUpdate:  # type: ignore[override]
        """Concatenate the micro-batches' queries of all replicas of this shard; weights are averaged."""
        replicas, scale = self.mesh.get_group("replica"), 1 / len(updates)
        flat: list[CooperativeUpdate] = [x for update in updates for x in update]
        q_AD, coef_A, weight_A, row_A = (gather(torch.cat(x), replicas) for x in zip(*flat, strict=True))
        return CooperativeUpdate(q_AD, coef_A * scale, weight_A * scale, row_A)

    def _step(  # type: ignore[override]
        self, update: CooperativeUpdate, lr: float | Tensor, seed: int | Tensor, skip: Tensor | None
    ) -> None:
        """Take AdCo's step, and add to each positive its difference to CaCo's step."""
        temperature = self.settings.temperature
        wide = torch.promote_types(self.w_KD.dtype, torch.float32)
        index_A, is_local_A = self._local(update.row_A)
        w_AD, n_AD, q_AD = self.w_KD[index_A].to(wide), self.n_KD[index_A].to(wide), update.q_AD.to(wide)
        p_A = update.coef_A * torch.exp((q_AD * n_AD).sum(1) / temperature)
        g_AD, first_A = _sum_equal(update.row_A, (update.weight_A - 2 * p_A)[:, None] * q_AD)
        norm_A1 = torch.linalg.vector_norm(w_AD, dim=1, keepdim=True)
        unit_AD = w_AD / norm_A1
        g_AD = (g_AD - (g_AD * unit_AD).sum(1, keepdim=True) * unit_AD) / (temperature * norm_A1)
        g_AD = g_AD * is_local_A[:, None]
        # What is written to a row must be equal, because the order of writing is not defined. So queries with the same
        # positive bring the first one's sum, and those whose positive is in another shard that of a local one. If there
        # is none, the first query's row is written as it is.
        chosen_A = torch.where(is_local_A, first_A, is_local_A.byte().argmax())
        index_A, g_AD = index_A[chosen_A], g_AD[chosen_A]

        super()._step(BankUpdate(update.q_AD, update.coef_A), lr, seed, skip)
        seed = seed ^ 1 << 31  # the rows are rounded a second time, by other random bits
        if self.v_KD is not None:
            self._write(self.v_KD, index_A, self.v_KD[index_A] - g_AD, seed, 16, skip)
        self._write(self.w_KD, index_A, self.w_KD[index_A] + lr * g_AD, seed, 0, skip)
        w_AD = self.w_KD[index_A].to(wide)
        unit_AD = (w_AD / torch.linalg.vector_norm(w_AD, dim=1, keepdim=True)).to(self.n_KD.dtype)
        self.n_KD[index_A] = unit_AD if skip is None else torch.where(skip, self.n_KD[index_A], unit_AD)

    def _write(
        self,
        x_KD: Tensor,
        index_A: Tensor,
        row_AD: Tensor,
        seed: int | Tensor,
        shift: int,
        skip: Tensor | None,
    ) -> None:
        """Write rows of this shard unless `skip`, in bf16 with random rounding by the random bits from `shift` on."""
        if x_KD.dtype == torch.bfloat16:
            row_AD = round_to_bf16(row_AD.float(), row_bits(seed, index_A + self.first, self.dim) >> shift)
        x_KD[index_A] = row_AD if skip is None else torch.where(skip, x_KD[index_A], row_AD)

    def _local(self, row_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' indices in this shard, clamped to it, and which of them [A] are in it."""
        index_A = (row_A - self.first).clamp(0, len(self.n_KD) - 1)
        return index_A, row_A == index_A + self.first


def _sum_equal(row_A: Tensor, x_AD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows of x that have the same index, in a fixed order and without reading the indices on the host.

    Returns:
        The sums, [A, D]: element i is the sum over all elements with the index of element i; and the position of the
        first of these elements, int64 [A].
    """
    sums, firsts = [], []
    for rows in row_A.split(_ROWS):
        equal = rows[:, None] == row_A
        sums.append(equal.to(x_AD.dtype) @ x_AD)
        firsts.append(equal.byte().argmax(1))
    return torch.cat(sums), torch.cat(firsts)
