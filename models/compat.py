"""Names that differ between the supported versions of torch (2.11 and newer)."""

from inspect import signature
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# torch 2.14 renamed the two collectives and DDP's argument; the old names warn there.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_forward_sync = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
# Arguments of DistributedDataParallel that leave BatchNorm's running statistics of each rank as they are.
DDP_LOCAL_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _forward_sync else "broadcast_buffers": False}
