"""From a configuration to the objects that it describes."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.loader import train_batches
from data.random import BANK, hash_counters
from data.sources.open import Source
from kernels import implementation
from models.batchnorm import synchronise_bn
from models.encoder import Encoder
from models.method import Method
from models.negatives.bank import Bank, make_mesh
from models.negatives.queue import Queue
from models.teacher import make_teacher
from trainer.config import Config, check_world
from trainer.distributed import RankInfo
from trainer.engines.base import Engine, unshard

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_encoder(config: Config) -> Encoder:
    """A fresh encoder, always the same for the same seed. Raises ValueError for a backbone that does not exist."""
    torch.manual_seed(config.run.seed)
    model = config.model
    return Encoder(
        model.backbone,
        dim=model.dim,
        hidden=model.hidden,
        head_norm=model.head_norm,
        predictor=model.predictor,
        small_images=model.small_images,
        stem_stride=model.stem_stride,
        backbone_args=model.backbone_args,
    )


def build_method(config: Config, rank_info: RankInfo, student: Encoder | None = None) -> Method:
    """Student (a fresh one if None), teacher and an empty bank, equal on all ranks.

    Raises ValueError where they do not fit the ranks.
    """
    method, bank = config.method, config.bank
    mesh = make_mesh(bank.placement, rank_info.device, rank_info.local_world_size)
    check_world(config, rank_info.world_size, rank_info.local_world_size)
    student = student or build_encoder(config)
    if method.bn == "sync":
        synchronise_bn(student, rank_info.device)
    student.to(rank_info.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernels = kernels_for(config, rank_info.device)
    precision = autocast_dtype(config, rank_info.device) if bank.precision == "auto" else DTYPES[bank.precision]
    negatives: Bank | Queue | None = None
    if method.negatives == "bank":
        negatives = Bank(
            bank.size,
            config.model.dim,
            mesh,
            kernels=kernels,
            temperature=bank.temperature,
            momentum=bank.momentum,
            weight_decay=bank.weight_decay,
            precision=precision,
            weights=DTYPES[bank.weights],
            velocity=None if bank.velocity == "none" else DTYPES[bank.velocity],
        )
    elif method.negatives == "queue":
        negatives = Queue(bank.size, config.model.dim, mesh, kernels=kernels, precision=precision, seed=config.run.seed)
    return method.make(student, negatives, kernels)


def kernels_for(config: Config, device: torch.device) -> str:
    """The implementation of the kernels. Raises ValueError where the one asked for does not run on this machine."""
    name = config.bank.kernels
    if name == "auto":
        name = "triton" if device.type == "cuda" else "chunked"
    implementation(name)
    return name


def build_engine(method: Method, config: Config, rank_info: RankInfo) -> Engine:
    """What makes the game's student learn; student and teacher are spread over the ranks in place.

    Raises ValueError where the configuration asks for what it cannot do.
    """
    precision = autocast_dtype(config, rank_info.device)
    batch_size = config.data.batch_size
    return config.engine.build(method.student, method.teacher, config.optim, batch_size, rank_info, precision)


def full_student(method: Method, engine: Engine, config: Config, rank_info: RankInfo) -> Encoder:
    """The student to evaluate, usable by each rank alone: a copy if ranks hold parts of it, or if it is compiled."""
    weights = engine.weights()["student"]
    if not config.engine.compile and not any(isinstance(x, DTensor) for x in weights.values()):
        return method.student
    student = build_encoder(config).to(rank_info.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.load_state_dict(unshard(weights))
    return student


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype:
    """That of run.precision; for auto bfloat16 where the device is made for it. float32 stands for no autocast."""
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return types.get(config.run.precision, torch.bfloat16 if auto else torch.float32)


@torch.no_grad()
def fill_bank(
    bank: Bank | None, config: Config, rank_info: RankInfo, source: Source, encoder: Encoder | None = None
) -> None:
    """Learned negatives' first weights: keys of the encoder, or random directions; at unit length.

    encoder: that before training, None for a fresh one.

    They are made in chunks of up to 256 rows, each a function of the seed and its number only, so the bank is the same
    for any number of ranks. Replicas share the work.
    """
    if bank is None:
        return
    chunk = min(256, len(source))
    first, last = bank.first, bank.first + len(bank.w_KD)
    chunks = range(first // chunk, -(-last // chunk))
    replica, replicas = bank.mesh.get_local_rank("replica"), bank.mesh.size(0)
    share = chunks[len(chunks) * replica // replicas : len(chunks) * (replica + 1) // replicas]
    if config.bank.init == "random":
        chunk_rows = _random_rows(config, rank_info.device, share, chunk)
    else:
        chunk_rows = _key_rows(encoder or build_encoder(config), config, rank_info.device, source, share, chunk)
    bank.w_KD.zero_()
    for c, rows_CD in zip(share, chunk_rows, strict=True):
        start, stop = max(c * chunk, first), min((c + 1) * chunk, last)
        rows_CD = torch.nn.functional.normalize(rows_CD, dim=1)
        bank.w_KD[start - first : stop - first] = rows_CD[start - c * chunk : stop - c * chunk]
    dist.all_reduce(bank.w_KD, group=bank.mesh.get_group("replica"))  # each row is zero on all replicas but one
    bank.loaded()


def _random_rows(config: Config, device: torch.device, chunks: range, size: int) -> Iterator[Tensor]:
    """[size, D] for each chunk."""
    for seed in hash_counters(config.run.seed, BANK, np.arange(chunks.start, chunks.stop)) >> np.uint64(2):
        yield torch.randn(size, config.model.dim, generator=torch.Generator().manual_seed(int(seed))).to(device)


def _key_rows(
    encoder: Encoder, config: Config, device: torch.device, source: Source, chunks: range, size: int
) -> Iterator[Tensor]:
    """[size, D] for each chunk: its images, augmented as views[0] is, seen by the encoder."""
    # In training mode: before any step BatchNorm's running statistics say nothing. With plain BatchNorm whatever
    # method.bn says: ranks make different numbers of chunks.
    encoder = make_teacher(encoder).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    update = {"views": config.data.views[:1], "batch_size": size, "backend": "cpu"}
    settings = config.data.model_copy(update={**update, "workers": config.data.workers_for(device)})
    seed = int(hash_counters(config.run.seed, BANK)[0] >> np.uint64(2))
    for batch in train_batches(source, settings, seed, 0, 1, chunks.start, chunks.stop, torch.device("cpu")):
        yield encoder(batch.normalized(device))
