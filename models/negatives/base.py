"""Negatives that persist over steps: their settings, the protocol of bank and queue, and their placement on the ranks.

K negatives of D dimensions are cut into shards. Ranks form a grid of replicas x shards: the ranks of a row hold
different shards, and those of a column hold the same one. Placement `sharded` is one row, `replicated` one column, and
`node` one row per node.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from models.compat import all_gather_single

Placement = Literal["replicated", "sharded", "node"]


class BankSettings(BaseModel):
    """Settings of the negatives: of learned ones (a bank, as in AdCo) or of earlier keys (a queue, as in MoCo)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    size: int = Field(65536, ge=1, description="Number of negatives over all ranks.")
    temperature: float = Field(
        0.02, gt=0, description="Temperature of the adversary's softmax over the negatives (AdCo, eq. 6); bank only."
    )
    lr: float = Field(
        3.0, ge=0, description="Learning rate of the negatives' gradient ascent (AdCo's code: 3.0); bank only."
    )
    lr_final: float | None = Field(
        None, ge=0, description="Learning rate at the last step, reached along a cosine; null keeps lr; bank only."
    )
    warmup: float = Field(0, ge=0, description="Epochs over which lr rises linearly from zero; bank only.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the gradient ascent; bank only.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of the gradient ascent; bank only.")
    init: Literal["keys", "random"] = Field(
        "keys",
        description="First rows of a bank: the untrained encoder's embeddings of images, or random directions.",
    )
    placement: Placement = Field(
        "sharded",
        description="Where the rows are: all on each rank, cut over all ranks, or cut over the ranks of each node.",
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="Type of queries, keys and negatives in their products; auto uses the encoder's autocast type.",
    )
    weights: Literal["fp32", "bf16"] = Field(
        "fp32", description="Stored type of a bank's weights; bf16 is rounded at random and saves 2 bytes a number."
    )
    velocity: Literal["fp32", "bf16", "none"] = Field(
        "fp32", description="Stored type of a bank's velocity; none needs momentum 0 and saves 4 bytes a number."
    )

    @model_validator(mode="after")
    def _momentum_needs_velocity(self) -> "BankSettings":
        if self.velocity == "none" and self.momentum > 0:
            raise ValueError(
                f"velocity: none goes with momentum: 0; for the same speed as momentum {self.momentum:g} "
                f"take lr: {self.lr / (1 - self.momentum):g}"
            )
        return self


class Negatives:
    """This rank's shard of K negatives that queries are contrasted with.

    Attributes:
        name: The key of the negatives' state in a checkpoint.
        learned: Whether the rows are learned vectors instead of embeddings of images.
        products: Matrix products of queries and negatives in a step.
        size: K, over all ranks.
        dim: D.
        mesh: The grid of ranks with dimensions "replica" and "shard", see `make_mesh`.
        first: Index of this shard's first row.
        n_KD: This shard's rows at unit length, of the dtype used in products.
        adversary_temperature: Temperature of the partition sum that `update` needs; None if it needs none.
    """

    name: ClassVar[str]
    learned: ClassVar[bool] = False
    products: ClassVar[int]

    def __init__(
        self,
        settings: BankSettings,
        dim: int,
        mesh: DeviceMesh,
        precision: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Allocate the shard.

        Args:
            settings: Size and constants.
            dim: D.
            mesh: The ranks that share the negatives.
            precision: Dtype of `n_KD`.
            seed: Seed of rows that are drawn at random, the same on all ranks.
        """
        self.size, self.dim, self.mesh = settings.size, dim, mesh
        self.first, rows = shard_rows(settings.size, mesh)
        self.n_KD = torch.zeros(rows, dim, dtype=precision, device=mesh.device_type)
        self.adversary_temperature: float | None = None

    def initialise(self, chunk_size: int, make_chunks: Callable[[range], Iterable[Tensor]]) -> None:
        """Fill learned rows before the first step; other negatives are complete from the start. Called by all ranks.

        Args:
            chunk_size: Rows of a chunk.
            make_chunks: Yields a tensor [chunk_size, D] for each of the given chunk indices; chunk c has the rows from
                c * chunk_size on. A chunk must depend on its index only, so that every number of ranks gets the same.
        """

    def update(
        self,
        updates: Sequence[Sequence[Any]],
        lr: float | Tensor,
        seed: int | Tensor,
        skip: Tensor | None = None,
    ) -> None:
        """Change the negatives after the student's step. Called by all ranks.

        Args:
            updates: `StepOutput.negatives_update` of each micro-batch.
            lr: Learning rate of learned negatives; a number, or a floating scalar on the device, as in training.
            seed: Seed of random rounding, different at each step and the same on all ranks; a number, or an int64
                scalar on the device. The host must not read these two scalars.
            skip: bool scalar on the device, equal on all ranks: where true, nothing changes, whatever `updates` has.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, which share memory with the negatives; shards are DTensors."""
        raise NotImplementedError

    def loaded(self) -> None:
        """Restore derived tensors after the tensors of `state_dict` were written."""

    def metrics(self) -> dict[str, float]:
        """Return values for the log, of all ranks' rows. Waits for the device; called by all ranks."""
        return {}

    def tensors(self) -> list[Tensor]:
        """Return all tensors that take memory."""
        return [self.n_KD]

    @classmethod
    def flops(cls, settings: BankSettings, dim: int) -> float:
        """Return the FLOPs of one query in a step."""
        return 2.0 * cls.products * settings.size * dim

    @classmethod
    def describe(cls, settings: BankSettings) -> str:
        """Describe the negatives in a few words, for people."""
        return f"{settings.size:,}"


def num_shards(placement: Placement, world_size: int, ranks_per_node: int) -> int:
    """Return how many shards a placement cuts the negatives into."""
    return {"replicated": 1, "sharded": world_size, "node": ranks_per_node}[placement]


def make_mesh(placement: Placement, device: torch.device, ranks_per_node: int) -> DeviceMesh:
    """Make the grid ("replica", "shard") of all ranks.

    Raises:
        ValueError: If the placement is `node` and the nodes have different numbers of ranks.
    """
    world_size = dist.get_world_size()
    if placement == "node" and world_size % ranks_per_node:
        raise ValueError(
            f"placement: node needs the same number of ranks on each node, got {world_size} ranks "
            f"with {ranks_per_node} on this node"
        )
    shards = num_shards(placement, world_size, ranks_per_node)
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replica", "shard"))


def world_group() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the tensors [N, ...] of all ranks of a group in the group's order; their shapes must be equal."""
    ranks = group.size()
    if ranks == 1:
        return x
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=group)
    return out


def shard_rows(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Return the index of this rank's first row of `size`, and how many rows it holds."""
    rows = -(-size // mesh.size(1))  # as torch.chunk and therefore DTensor cut
    first = min(mesh.get_local_rank("shard") * rows, size)
    return first, min(rows, size - first)


def as_dtensor(local: Tensor, size: int, mesh: DeviceMesh) -> DTensor:
    """Wrap this rank's shard [., D] of a tensor [size, D] without a copy, so that checkpoints can reshard it."""
    shape = torch.Size((size, local.shape[1]))
    placement = (Replicate(), Shard(0))
    return DTensor.from_local(local, mesh, placement, run_check=False, shape=shape, stride=(local.shape[1], 1))
