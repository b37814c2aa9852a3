"""AdCo in plain PyTorch: this project's bank of negatives in a training loop of your own.

    python docs/examples/adco.py                             # one process
    torchrun --nproc-per-node=2 docs/examples/adco.py        # the bank is sharded over the ranks

On GPUs the same lines run on the Triton kernels. The images here are noise; replace `batches` by your data loader.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.negatives.bank import Bank
from models.negatives.base import BankSettings, make_mesh
from models.negatives.contrast import contrast

TEMPERATURE, BANK_LR, TEACHER_MOMENTUM = 0.12, 3.0, 0.999


def train(student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], bank: Bank, lr: float) -> Iterator[float]:
    """Train on pairs of views, normalised images [B, 3, H, W] of this rank. Yields this rank's loss of each step."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    replicated = DistributedDataParallel(student)
    for step, (key_view, query_view) in enumerate(batches):
        with torch.no_grad():
            keys = F.normalize(teacher(key_view), dim=1)
        queries = F.normalize(replicated(query_view), dim=1)
        result = contrast(queries, keys, bank, TEMPERATURE, batch_keys=True)
        loss = result.loss_N.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # The negatives ascend on the mean loss over all ranks' queries.
        bank.update([[result.bank_update(1 / len(queries) / dist.get_world_size())]], BANK_LR, seed=step)
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 1 - TEACHER_MOMENTUM)
        yield loss.item()


def main() -> None:
    """Train a ResNet-18 on noise for three steps."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", dist.get_node_local_rank(0)) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the bank lies on the current device
    torch.manual_seed(0)  # equal weights on all ranks
    student = torchvision.models.resnet18(num_classes=128).to(device)
    bank = Bank(BankSettings(size=4096), dim=128, mesh=make_mesh("sharded", device, ranks_per_node=1))
    bank.fill(torch.randn(4096, 128)[bank.first :][: len(bank.w_KD)])
    torch.manual_seed(dist.get_rank())
    batches = ((torch.randn(8, 3, 64, 64, device=device), torch.randn(8, 3, 64, 64, device=device)) for _ in range(3))
    for loss in train(student, batches, bank, lr=0.03):
        print(f"rank {dist.get_rank()}: loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
