"""The bank of learned negatives (AdCo, arXiv 2011.08435): weights, velocity and unit rows of this rank's shard."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import kernels
from kernels import AdversaryParams, AdversaryStats
from models.negatives.base import BankSettings, Negatives, as_dtensor, gather

_TILE = 65536  # rows processed at a time where a copy of the whole shard would take too much memory


class BankUpdate(NamedTuple):
    """The input of the bank's step from N queries, those of one row of the grid of ranks.

    Attributes:
        q_ND: Unit queries, of the dtype of the bank's unit rows.
        coef_N: w_i / Z^a_i, the query's weight in the loss over its partition sum, fp32.
    """

    q_ND: Tensor
    coef_N: Tensor


class Bank(Negatives):
    """This rank's shard of K learned negatives, which ascend on the contrastive loss.

    Attributes:
        w_KD: Weights, fp32 or bf16.
        v_KD: Velocity, fp32 or bf16; None for none.
        stats: Statistics of this shard's last step.
    """

    name = "bank"
    learned = True
    products = 3  # similarities, the queries' gradient and the negatives' gradient

    def __init__(
        self,
        settings: BankSettings,
        dim: int,
        mesh: DeviceMesh,
        precision: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(settings, dim, mesh, precision, seed)
        wide = torch.promote_types(precision, torch.float32)
        dtypes = {"fp32": wide, "bf16": torch.bfloat16}
        self.settings = settings
        self.adversary_temperature = settings.temperature
        self.w_KD = torch.zeros_like(self.n_KD, dtype=dtypes[settings.weights])
        self.v_KD: Tensor | None = None
        if settings.velocity != "none":
            self.v_KD = torch.zeros_like(self.n_KD, dtype=dtypes[settings.velocity])
        self.stats: AdversaryStats | None = None

    @torch.no_grad()
    def initialise(self, chunk_size: int, make_chunks: Callable[[range], Iterable[Tensor]]) -> None:
        """Set the weights to the chunks' rows at unit length. Replicas of a shard divide its chunks among them."""
        first, last = self.first, self.first + len(self.w_KD)
        chunks = range(first // chunk_size, -(-last // chunk_size))
        replica, replicas = self.mesh.get_local_rank("replica"), self.mesh.size(0)
        share = chunks[len(chunks) * replica // replicas : len(chunks) * (replica + 1) // replicas]
        self.w_KD.zero_()
        for c, rows_CD in zip(share, make_chunks(share), strict=True):
            start, stop = max(c * chunk_size, first), min((c + 1) * chunk_size, last)
            rows_CD = torch.nn.functional.normalize(rows_CD, dim=1)
            self.w_KD[start - first : stop - first] = rows_CD[start - c * chunk_size : stop - c * chunk_size]
        dist.all_reduce(self.w_KD, group=self.mesh.get_group("replica"))  # a row is zero on all replicas but one
        self.loaded()

    def fill(self, w_KD: Tensor) -> None:
        """Set the weights of this shard, [rows, D], and the velocity to zero."""
        self.w_KD.copy_(w_KD)
        if self.v_KD is not None:
            self.v_KD.zero_()
        self.loaded()

    def update(
        self,
        updates: Sequence[Sequence[BankUpdate]],
        lr: float | Tensor,
        seed: int | Tensor,
        skip: Tensor | None = None,
    ) -> None:
        """Take one step of gradient ascent on the mean loss of the micro-batches, see `Negatives.update`.

        Replicas of a shard gather each other's queries and take the same step, so traffic does not depend on K.
        """
        self._step(self._gather_updates(updates), lr, seed, skip)

    def _gather_updates(self, updates: Sequence[Sequence[BankUpdate]]) -> BankUpdate:
        """Concatenate the micro-batches' queries of all replicas of this shard; weights are averaged."""
        replicas = self.mesh.get_group("replica")
        flat = [x for update in updates for x in update]
        return BankUpdate(
            gather(torch.cat([x.q_ND for x in flat]), replicas),
            gather(torch.cat([x.coef_N / len(updates) for x in flat]), replicas),
        )

    def _step(self, update: BankUpdate, lr: float | Tensor, seed: int | Tensor, skip: Tensor | None) -> None:
        """Take one step of gradient ascent on the loss of `update`."""
        self.stats = kernels.adversary_step(
            *update,
            self.n_KD,
            self.w_KD,
            self.v_KD,
            AdversaryParams(self.settings.temperature, lr, self.settings.momentum, self.settings.weight_decay),
            seed=seed,
            first=self.first,
            skip=skip,
        )

    def metrics(self) -> dict[str, float]:
        """Return statistics of all ranks' rows. Waits for the device; called by all ranks.

        Returns:
            A dictionary: adversary_grad_norm, the mean norm of the rows' gradients in the last step; bank_norm, the
            mean norm of the weights' rows; bank_share, the share of negatives that carry probability, measured as the
            participation ratio (sum m)^2 / (K sum m^2) of the rows' probability mass m.
        """
        if self.stats is None:
            return {}
        norm = torch.stack([torch.linalg.vector_norm(w_KD, dim=1).sum() for _, w_KD in self._tiles()]).sum()
        grad_K, mass_K = self.stats.grad_K, self.stats.mass_K
        # In fp32 the square of a mass of 1e-23 is 0, and negatives without weight have less.
        squares = torch.linalg.vector_norm(mass_K, dtype=torch.float64).square()
        sums = torch.stack([grad_K.sum().double(), norm.double(), mass_K.sum(dtype=torch.float64), squares])
        dist.all_reduce(sums, group=self.mesh.get_group("shard"))
        grad, norm_sum, mass, square_mass = sums.tolist()
        return {
            "adversary_grad_norm": grad / self.size,
            "bank_norm": norm_sum / self.size,
            "bank_share": mass**2 / (self.size * square_mass) if square_mass else 0.0,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return `w` and, if there is a velocity, `v`."""
        return {
            name: as_dtensor(local, self.size, self.mesh)
            for name, local in (("w", self.w_KD), ("v", self.v_KD))
            if local is not None
        }

    def loaded(self) -> None:
        """Recompute the unit rows from the weights."""
        for tile, w_KD in self._tiles():
            self.n_KD[tile] = w_KD / torch.linalg.vector_norm(w_KD, dim=1, keepdim=True)

    def tensors(self) -> list[Tensor]:
        """Return weights, velocity and unit rows."""
        return [self.w_KD, self.n_KD] + ([] if self.v_KD is None else [self.v_KD])

    @classmethod
    def describe(cls, settings: BankSettings) -> str:
        """Describe size and constants."""
        return f"{settings.size:,}, learning rate {settings.lr:g}, temperature {settings.temperature:g}"

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weights tile by tile, widened to fp32 if they are bf16."""
        for start in range(0, len(self.w_KD), _TILE):
            tile = slice(start, start + _TILE)
            yield tile, self.w_KD[tile].to(torch.promote_types(self.w_KD.dtype, torch.float32))
