"""The bank of learned negatives: master weights, velocity and unit rows, cut into shards over the ranks.

K negatives of D dimensions. Ranks form a grid of replicas x shards: the ranks of a row hold different shards of the
bank, those of a column the same one. `sharded` is one row, `replicated` one column, `node` a row per node.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import kernels
from kernels import AdversaryStats

_TILE = 65536  # rows at a time where a copy of the whole shard would not fit beside it


def make_mesh(placement: str, device: torch.device, ranks_per_node: int) -> DeviceMesh:
    """The grid ("replica", "shard") of all ranks for a placement: replicated, sharded or node.

    Raises ValueError where `node` is asked for and nodes do not have equally many ranks.
    """
    world_size = dist.get_world_size()
    if placement == "node" and world_size % ranks_per_node:
        raise ValueError(
            f"bank.placement: node needs as many ranks on each node, got {world_size} for {ranks_per_node} a node"
        )
    shards = {"replicated": 1, "sharded": world_size, "node": ranks_per_node}[placement]
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replica", "shard"))


def everyone() -> dist.ProcessGroup:
    """The group of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x (equal shapes [N, ...]) one after the other in the group's order."""
    ranks = group.size()
    if ranks == 1:
        return x
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_single(out, x.contiguous(), group=group)
    return out


def shard_rows(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's first of `size` rows, and how many it holds."""
    rows = -(-size // mesh.size(1))  # as torch.chunk cuts and so as DTensor does
    first = min(mesh.get_local_rank("shard") * rows, size)
    return first, min(rows, size - first)


def sharded(local: Tensor, size: int, mesh: DeviceMesh) -> DTensor:
    """This rank's shard [., D] as a part of [size, D], sharing its memory: checkpoints reshard."""
    shape = torch.Size((size, local.shape[1]))
    placement = (Replicate(), Shard(0))
    return DTensor.from_local(local, mesh, placement, run_check=False, shape=shape, stride=(local.shape[1], 1))


class BankUpdate(NamedTuple):
    """What the adversary plays against: this shard row's queries and their weight over their partition sum.

    q_ND: unit queries, of the type of the bank's unit rows. coef_N: w_i / Z^a_i, fp32.
    """

    q_ND: Tensor
    coef_N: Tensor


class Bank:
    """This rank's shard of K negatives.

    w_KD, v_KD: weights and velocity; None: no velocity. n_KD: rows of W at unit length. first: number of the first
    row held.
    kernels: name of their implementation (`kernels.IMPLEMENTATIONS`). temperature, momentum, weight_decay: the
    adversary's. precision: type of queries, keys and unit rows in products, which are added up in fp32.
    weights, velocity: type of W and v; bf16 is rounded at random (`kernels.rounding`), None is for momentum 0.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        mesh: DeviceMesh,
        *,
        kernels: str,
        temperature: float,
        momentum: float,
        weight_decay: float,
        precision: torch.dtype = torch.float32,
        weights: torch.dtype = torch.float32,
        velocity: torch.dtype | None = torch.float32,
    ) -> None:
        self.size, self.dim, self.mesh, self.kernels = size, dim, mesh, kernels
        self.temperature, self.momentum, self.weight_decay = temperature, momentum, weight_decay
        self.first, local = shard_rows(size, mesh)
        self.w_KD = torch.zeros(local, dim, dtype=weights, device=mesh.device_type)
        self.v_KD = None if velocity is None else torch.zeros_like(self.w_KD, dtype=velocity)
        self.n_KD = torch.zeros_like(self.w_KD, dtype=precision)

    def fill(self, w_KD: Tensor) -> None:
        """Start from these weights, [this shard's rows, D], at rest."""
        self.w_KD.copy_(w_KD)
        if self.v_KD is not None:
            self.v_KD.zero_()
        self.loaded()

    def step(self, rows: list[BankUpdate], lr: float, seed: int) -> AdversaryStats:
        """One step of gradient ascent for all rows of one training step. Statistics are of this shard.

        seed: of the rounding of bf16 weights, another at each step and the same on all ranks.
        Replicas gather each other's rows, so that they take the same step: traffic that does not depend on K.
        """
        replicas = self.mesh.get_group("replica")
        return kernels.adversary_step(
            gather(torch.cat([r.q_ND for r in rows]), replicas),
            gather(torch.cat([r.coef_N for r in rows]), replicas),
            self.n_KD,
            self.w_KD,
            self.v_KD,
            temperature=self.temperature,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            seed=seed,
            first=self.first,
            kernels=self.kernels,
        )

    def metrics(self, stats: AdversaryStats) -> dict[str, float]:
        """Of the whole bank, for the log; waits for the device.

        adversary_grad_norm: mean length of the gradients. bank_norm: mean length of W's rows. bank_share: the
        negatives that carry weight, as the participation ratio (sum m)^2 / (K sum m^2) of their shares m.
        """
        length = torch.stack([torch.linalg.vector_norm(w_KD, dim=1).sum() for _, w_KD in self._tiles()]).sum()
        mass_K = stats.mass_K
        sums = torch.stack([stats.grad_K.sum(), length, mass_K.sum(), mass_K.square().sum()])
        dist.all_reduce(sums, group=self.mesh.get_group("shard"))
        grad, length, mass, squares = sums.tolist()
        return {
            "adversary_grad_norm": grad / self.size,
            "bank_norm": length / self.size,
            "bank_share": mass**2 / (self.size * squares),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """W and v, if there is one, as DTensors over the mesh that share memory with the bank: checkpoints reshard."""
        return {
            name: sharded(local, self.size, self.mesh)
            for name, local in (("w", self.w_KD), ("v", self.v_KD))
            if local is not None
        }

    def loaded(self) -> None:
        """To be called when W and v were written through `state_dict`: makes the unit rows."""
        for tile, w_KD in self._tiles():
            self.n_KD[tile] = w_KD / torch.linalg.vector_norm(w_KD, dim=1, keepdim=True)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weights, in fp32 or wider, some rows at a time."""
        for start in range(0, len(self.w_KD), _TILE):
            tile = slice(start, start + _TILE)
            yield tile, self.w_KD[tile].to(torch.promote_types(self.w_KD.dtype, torch.float32))
