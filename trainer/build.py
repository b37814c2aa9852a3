"""From a configuration to the objects that it describes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.loader import train_batches
from data.random import BANK, hash_counters
from data.references import is_reference, resolve
from data.sources.base import Source
from models.batchnorm import group_bn, stop_counting, synchronise_bn
from models.encoder import Encoder
from models.method import Method
from models.negatives.base import make_mesh
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
        resolve(model.backbone) if is_reference(model.backbone) else model.backbone,
        dim=model.dim,
        hidden=model.hidden,
        head_layers=model.head_layers,
        head_norm=model.head_norm,
        head_final_norm=model.head_final_norm,
        head_bias=model.head_bias,
        predictor=model.predictor,
        small_images=model.small_images,
        stem_stride=model.stem_stride,
        stem_padding=model.stem_padding,
        backbone_args=model.backbone_args,
    )


def check_image_sizes(encoder: Encoder, config: Config, sizes: set[int]) -> None:
    """Raise ValueError if the backbone has a fixed image size, such as timm's Swin, and images have another one."""
    patches = getattr(encoder.backbone, "patch_embed", None)
    fixed = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", False) else None
    if fixed and any((size, size) != tuple(fixed) for size in sizes):
        raise ValueError(
            f"model.backbone: {config.model.backbone} takes only images of {fixed[0]} x {fixed[1]} pixels, "
            f"data.views and eval.size have {', '.join(map(str, sorted(sizes)))}; need one size for all, which "
            "model.backbone_args={img_size: SIZE} gives the backbone, or a backbone for any size, such as resnet50 or "
            "vit_small_patch16_224"
        )


def build_method(config: Config, rank_info: RankInfo, student: Encoder | None = None) -> Method:
    """Build student, teacher and negatives, equal on all ranks. Learned negatives are zero until they are initialised.

    Args:
        config: The configuration.
        rank_info: This process among all ranks.
        student: Starts from these weights; None for a fresh encoder.

    Raises:
        ValueError: If the configuration does not fit the number of ranks, or its image sizes do not fit the backbone.
    """
    method, bank, device = config.method, config.bank, rank_info.device
    mesh = make_mesh(bank.placement, device, rank_info.local_world_size)
    check_world(config, rank_info.world_size, rank_info.local_world_size)
    student = student or build_encoder(config)
    sizes = {view.size for view in config.data.views}
    check_image_sizes(student, config, sizes | ({config.eval.size} if config.eval.size else set()))
    if method.bn == "sync":
        synchronise_bn(student, device)
    elif method.bn_group:
        group_bn(student, method.bn_group)
    stop_counting(student)
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = autocast_dtype(config, device) if bank.precision == "auto" else DTYPES[bank.precision]
    negatives = method.build_negatives(bank, config.model.dim, mesh, precision, config.run.seed)
    return method.make(student, negatives)


def full_student(method: Method, engine: Engine, config: Config, rank_info: RankInfo) -> Encoder:
    """Return the complete student, which each rank can use alone; a copy if it is sharded or compiled. Collective."""
    weights = engine.weights()["student"]
    if config.engine.compile == "none" and not any(isinstance(x, DTensor) for x in weights.values()):
        return method.student
    student = build_encoder(config).to(rank_info.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.load_state_dict(unshard(weights))
    return student


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the type of autocast. For `auto` it is bf16 where the device supports it; fp32 means no autocast."""
    if config.run.precision != "auto":
        return DTYPES[config.run.precision]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


@torch.no_grad()
def initialise_negatives(
    method: Method, config: Config, rank_info: RankInfo, source: Source, encoder: Encoder | None = None
) -> None:
    """Give learned negatives their first rows: random directions, or embeddings of images by the untrained encoder.

    Rows are made in chunks. Each chunk is a function of the seed and its index only, so the rows are the same for any
    number of ranks.

    Args:
        method: Owns the negatives.
        config: The configuration.
        rank_info: This process among all ranks.
        source: The images to embed.
        encoder: The encoder before training; None for a fresh one.
    """
    chunk_size, device = min(256, len(source)), rank_info.device

    def random_chunks(chunks: range) -> Iterator[Tensor]:
        for seed in hash_counters(config.run.seed, BANK, np.arange(chunks.start, chunks.stop)) >> np.uint64(2):
            generator = torch.Generator().manual_seed(int(seed))
            yield torch.randn(chunk_size, config.model.dim, generator=generator).to(device)

    def key_chunks(chunks: range) -> Iterator[Tensor]:
        # A copy in training mode, because BatchNorm's running statistics mean nothing before the first step, and with
        # plain BatchNorm whatever method.bn is, because ranks embed different numbers of chunks.
        network = make_teacher(encoder or build_encoder(config))
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        update = {"views": config.data.views[:1], "batch_size": chunk_size, "backend": "cpu"}
        settings = config.data.model_copy(update={**update, "workers": config.data.workers_for(device)})
        seed = int(hash_counters(config.run.seed, BANK)[0] >> np.uint64(2))
        for batch in train_batches(source, settings, seed, 0, 1, chunks.start, chunks.stop, torch.device("cpu")):
            yield network(batch.normalized(device))

    if method.negatives:
        method.negatives.initialise(chunk_size, random_chunks if config.bank.init == "random" else key_chunks)
