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
        pointer: Index of the row that is replaced next, int64.
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
        self.pointer = torch.zeros((), dtype=torch.int64)
        for start in range(self.first // _CHUNK * _CHUNK, self.first + len(self.n_KD), _CHUNK):
            generator = torch.Generator().manual_seed(seed + start)
            self._write(start, torch.nn.functional.normalize(torch.randn(_CHUNK, dim, generator=generator), dim=1))

    @torch.no_grad()
    def update(self, updates: Sequence[Sequence[Tensor]], lr: float = 0.0, seed: int = 0) -> None:
        """Replace the oldest rows by this step's keys.

        Keys enter in the order of the global batch, so the queue does not depend on the number of ranks.

        Args:
            updates: This rank's keys [B, D] of each view, for each micro-batch.
            lr: Unused.
            seed: Unused.
        """
        for k_BD in (k_BD for update in updates for k_BD in update):
            k_ND = gather(k_BD.to(self.n_KD.dtype), world_group())
            start = int(self.pointer)
            self._write(start, k_ND)
            self._write(start - self.size, k_ND)  # rows past the end continue at the beginning
            self.pointer.fill_((start + len(k_ND)) % self.size)

    def _write(self, start: int, k_ND: Tensor) -> None:
        """Write rows to the indices from `start` on, as far as this shard holds them."""
        begin, end = max(start, self.first), min(start + len(k_ND), self.first + len(self.n_KD))
        if begin < end:
            self.n_KD[begin - self.first : end - self.first] = k_ND[begin - start : end - start]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the keys `n` and the `pointer`."""
        return {"n": as_dtensor(self.n_KD, self.size, self.mesh), "pointer": self.pointer}


def check_queue(settings: BankSettings, keys: int) -> None:
    """Raise ValueError if the queue is shorter than the number of keys that enter it in a step."""
    if settings.size < keys:
        raise ValueError(f"bank.size: a queue of {settings.size} is shorter than the {keys} keys of a step")
