"""Opens the images of a run on all ranks and checks that every rank finds the same ones."""

import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from data import shared_memory
from data.settings import DataSettings
from data.sources.base import Source
from data.sources.open import open_source
from trainer.config import Config
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.evaluate.features import image_size


def open_training(config: Config, folder: Path) -> Source:
    """Open the training images only, and check the batch size against them. Called by all ranks.

    Raises:
        ValueError: On all ranks; see `open_sources` and `check_batch`.
    """
    train, _ = open_sources(config.data.model_copy(update={"val": None}), folder)
    check_batch(config, train)
    return train


def check_batch(config: Config, train: Source) -> None:
    """Raise ValueError if a batch is larger than the training set."""
    if (batch := config.data.batch_size) > len(train):
        raise ValueError(
            f"data.batch_size: a batch of {batch} images is larger than {config.data.train}, which has {len(train)}"
        )


def check_shared_memory(config: Config, train: Source, rank_info: RankInfo) -> None:
    """Raise ValueError on all ranks if the batches of the run and its evaluations do not fit into shared memory."""
    needed = shared_memory_bytes(config, train, rank_info.device, rank_info.world_size)
    raise_on_all_ranks(shared_memory.shortage(needed, rank_info.local_world_size))


def shared_memory_bytes(config: Config, train: Source, device: torch.device, world_size: int) -> int:
    """Return the bytes of shared memory that a rank's batches can occupy, with those of an evaluation."""
    needed = shared_memory.training_bytes(train, config.data, device, world_size)
    if config.data.val is None:
        return needed
    workers, batch_size = config.data.workers_for(device), min(config.eval.batch_size, len(train))
    return needed + shared_memory.evaluation_bytes(image_size(config), batch_size, workers)


def open_sources(data: DataSettings, folder: Path) -> tuple[Source, Source | None]:
    """Open the training images and, if `data.val` is set, the validation images. Called by all ranks.

    Args:
        data: The section `data` of the configuration.
        folder: Run directory, where the indices of the images are stored.

    Returns:
        The training source, and the validation source or None.

    Raises:
        ValueError: On all ranks, if a rank cannot open the images or finds other images than rank 0, or if the
            validation images have classes that the training images lack.
    """
    train, val = None, None
    for turn in (True, False):  # rank 0 may list millions of files; the other ranks then read the stored index
        error = None
        try:
            if (dist.get_rank() == 0) == turn:
                train = open_source(data.train, folder / "index-train.npz")
                val = open_source(data.val, folder / "index-val.npz") if data.val else None
        except (ValueError, OSError) as cause:
            error = f"data: {cause}"
        raise_on_all_ranks(error)
    assert train is not None
    if val and (unknown := sorted(set(val.classes) - set(train.classes))):
        error = f"data.val: {data.val} has classes that {data.train} does not have: {', '.join(unknown[:3])}"
    raise_on_all_ranks(error)
    for name, source in (("data.train", train), ("data.val", val)):
        if source:
            mine = (len(source), len(source.classes), zlib.crc32(source.labels.tobytes()))
            first = [mine]
            dist.broadcast_object_list(first)
            here, there = ("{} images in {} classes, checksum {:08x}".format(*x) for x in (mine, first[0]))
            raise_on_all_ranks(None if mine == first[0] else f"{name}: this rank finds {here}, rank 0 finds {there}")
    return train, val
