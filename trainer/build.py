"""From a configuration to the objects that it describes."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.index import Source
from data.loader import normalize, train_batches
from data.random import BANK, hash_counters
from kernels import implementation
from models.adco import AdCo
from models.bank import Bank, make_mesh
from models.encoder import Encoder
from models.shuffle_bn import synchronise_bn
from models.teacher import make_teacher
from trainer.config import Config, check_world
from trainer.distributed import Place


def make_encoder(config: Config) -> Encoder:
    """A fresh encoder, always the same for the same seed. Raises ValueError for a backbone that does not exist."""
    torch.manual_seed(config.run.seed)
    model = config.model
    return Encoder(
        model.backbone,
        dim=model.dim,
        hidden=model.hidden,
        small_images=model.small_images,
        backbone_args=model.backbone_args,
    )


def make_game(config: Config, place: Place) -> AdCo:
    """Student, teacher and an empty bank, equal on all ranks. Raises ValueError where they do not fit the ranks."""
    method, bank = config.method, config.bank
    mesh = make_mesh(bank.placement, place.device, place.local_world)
    check_world(config, place.world, mesh.size(1))
    student = make_encoder(config)
    if method.bn == "sync":
        synchronise_bn(student, place.device)
    student.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return AdCo(
        student,
        make_teacher(student),
        Bank(
            bank.size,
            config.model.dim,
            mesh,
            implementation(bank.kernels),
            temperature=bank.temperature,
            momentum=bank.momentum,
            weight_decay=bank.weight_decay,
        ),
        temperature=method.temperature,
        symmetric=method.symmetric,
        batch_keys=method.batch_keys,
        crops=method.crops,
        bn=method.bn,
    )


def autocast_type(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 where asked for, or where the device is made for it; float32 stands for no autocast."""
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        torch.bfloat16 if config.run.precision == "bf16" or (config.run.precision == "auto" and auto) else torch.float32
    )


@torch.no_grad()
def fill_bank(bank: Bank, config: Config, place: Place, source: Source) -> None:
    """The negatives' first weights: keys of the untrained encoder, or random directions; at unit length.

    They are made in chunks of 256 rows, each a function of the seed and its number only, so the bank is the same
    for any number of ranks. Replicas share the work.
    """
    random = config.bank.init == "random"
    chunk = 256 if random else min(256, len(source))
    replica, replicas = bank.mesh.get_local_rank("replica"), bank.mesh.size(0)
    w_KD = torch.zeros_like(bank.w_KD)
    last = bank.first + len(w_KD)
    chunks = range(bank.first // chunk, -(-last // chunk))
    share = chunks[len(chunks) * replica // replicas : len(chunks) * (replica + 1) // replicas]
    seed = int(hash_counters(config.run.seed, BANK)[0] >> np.uint64(2))
    # Training mode: before any step BatchNorm's running statistics say nothing. Plain BatchNorm whatever method.bn:
    # ranks make different numbers of chunks.
    encoder = make_encoder(config).to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = config.data
    batches = train_batches(
        source, [data.views[0]], data.augment, seed, chunk, 0, 1, share.start, share.stop, data.workers, False
    )
    for c in share:
        if random:
            generator = torch.Generator().manual_seed(seed + c)
            rows_CD = torch.randn(chunk, bank.dim, generator=generator).to(place.device)
        else:
            rows_CD = encoder([normalize(next(batches).views[0].to(place.device), torch.float32)])
        start, stop = max(c * chunk, bank.first), min((c + 1) * chunk, last)
        w_KD[start - bank.first : stop - bank.first] = rows_CD[start - c * chunk : stop - c * chunk]
    dist.all_reduce(w_KD, group=bank.mesh.get_group("replica"))  # each row is zero on all replicas but one
    bank.fill(torch.nn.functional.normalize(w_KD, dim=1))


def weights(game: AdCo) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint that say what was learned; they share memory with the game."""
    return {
        "student": game.student.state_dict(),
        "teacher": game.teacher.state_dict(),
        "bank": game.bank.state_dict(),
    }
