"""The queue of keys: the last K that teachers made, oldest replaced first (MoCo, arXiv 1911.05722, sec. 3.2).

K keys of D dimensions, cut into shards over the grid of ranks as the bank is; see `models/negatives/bank.py`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.negatives.bank import everyone, gather, shard_rows, sharded

_CHUNK = 256  # first rows that one seed draws


class Queue:
    """This rank's shard of K keys, at first random directions, the same for any number of ranks.

    n_KD: unit rows, of type `precision`. pointer: number of the row that is replaced next. first: number of the first
    row held. kernels: name of their implementation.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        mesh: DeviceMesh,
        *,
        kernels: str,
        precision: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.size, self.dim, self.mesh, self.kernels = size, dim, mesh, kernels
        self.first, local = shard_rows(size, mesh)
        self.pointer = torch.zeros((), dtype=torch.int64)
        self.n_KD = torch.zeros(local, dim, dtype=precision, device=mesh.device_type)
        for start in range(self.first // _CHUNK * _CHUNK, self.first + local, _CHUNK):
            generator = torch.Generator().manual_seed(seed + start)
            self._write(start, torch.nn.functional.normalize(torch.randn(_CHUNK, dim, generator=generator), dim=1))

    @torch.no_grad()
    def put(self, keys: Iterable[Tensor]) -> None:
        """Take in this rank's keys, tensors [B, D]: of each tensor all ranks' keys, in the order of the ranks.

        That is the order of the global batch, whatever the number of ranks.
        """
        for k_BD in keys:
            k_ND = gather(k_BD.to(self.n_KD.dtype), everyone())
            start = int(self.pointer)
            self._write(start, k_ND)
            self._write(start - self.size, k_ND)  # those that are past the end, at the beginning
            self.pointer.fill_((start + len(k_ND)) % self.size)

    def _write(self, start: int, k_ND: Tensor) -> None:
        """Rows of the whole queue from `start` on, as far as they are held here."""
        begin, end = max(start, self.first), min(start + len(k_ND), self.first + len(self.n_KD))
        if begin < end:
            self.n_KD[begin - self.first : end - self.first] = k_ND[begin - start : end - start]

    def state_dict(self) -> dict[str, Tensor]:
        """Keys, as a DTensor over the mesh that shares memory with the queue, and pointer."""
        return {"n": sharded(self.n_KD, self.size, self.mesh), "pointer": self.pointer}
