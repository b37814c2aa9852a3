"""The queue of the teacher's last K keys; new keys replace the oldest (MoCo, arXiv 1911.05722, sec. 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.negatives.base import BankSettings, Negatives, as_dtensor, gather, world_group

_CHUNK = 256  # rows drawn from one seed


class Queue(Negatives):
    """This rank's shard of a queue of K keys, which starts with random directions.

    Attributes:
        pointer: Index of the row that is replaced next, int64, on the device.
        slots: The rows, and one more that receives the keys which do not enter this shard.
    """

    name = "queue"
    products = 2  # similarities and the queries' gradient

    def __init__(
        self,
        settings: BankSettings,
        dim: int,
        mesh: DeviceMesh,
        precision: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(settings, dim, mesh, precision, seed)
        rows = len(self.n_KD)
        self.slots = torch.zeros(rows + 1, dim, dtype=precision, device=mesh.device_type)
        self.n_KD = self.slots[:rows]
        self.pointer = torch.zeros((), dtype=torch.int64, device=mesh.device_type)
        for start in range(self.first // _CHUNK * _CHUNK, self.first + rows, _CHUNK):
            generator = torch.Generator().manual_seed(seed + start)
            k_CD = torch.nn.functional.normalize(torch.randn(_CHUNK, dim, generator=generator), dim=1)
            begin, end = max(start, self.first), min(start + _CHUNK, self.first + rows)
            self.n_KD[begin - self.first : end - self.first] = k_CD[begin - start : end - start]

    @torch.no_grad()
    def update(
        self,
        updates: Sequence[Sequence[Tensor]],
        lr: float | Tensor = 0.0,
        seed: int | Tensor = 0,
        skip: Tensor | None = None,
    ) -> None:
        """Replace the oldest rows by this step's keys.

        Keys enter in the order of the global batch, so the queue does not depend on the number of ranks.

        Args:
            updates: This rank's keys [B, D] of each view, for each micro-batch.
            lr: Unused.
            seed: Unused.
            skip: See `Negatives.update`.
        """
        for k_BD in (k_BD for update in updates for k_BD in update):
            k_ND = gather(k_BD.to(self.n_KD.dtype), world_group())
            row_N = torch.arange(-self.first, len(k_ND) - self.first, device=k_ND.device).add_(self.pointer)
            row_N = row_N.remainder_(self.size).clamp_(max=len(self.n_KD))
            pointer = (self.pointer + len(k_ND)) % self.size
            if skip is not None:
                row_N, pointer = row_N.masked_fill_(skip, len(self.n_KD)), torch.where(skip, self.pointer, pointer)
            self.slots[row_N] = k_ND
            self.pointer.copy_(pointer)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the keys `n` and the `pointer`."""
        return {"n": as_dtensor(self.n_KD, self.size, self.mesh), "pointer": self.pointer}


def check_queue(settings: BankSettings, keys: int) -> None:
    """Raise ValueError if the queue is shorter than the number of keys that enter it in a step."""
    if settings.size < keys:
        raise ValueError(f"bank.size: a queue of {settings.size} is shorter than the {keys} keys of a step")
