"""Opens the images of a run on all ranks and checks that every rank finds the same ones."""

import os
import socket
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data import shared_memory
from data.settings import DataSettings
from data.sources.base import Source
from data.sources.folder import ImageFolder
from data.sources.open import open_source
from trainer.config import Config
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.evaluate.features import image_size
from trainer.run.images import Fingerprint, check_images, describe, difference, fingerprint, record_images

SPOT_CHECKS = 256  # images whose files each node looks for


class Sources(NamedTuple):
    """The images of a run: those of `data.train`, of `data.val` if it is set, and of `data.more_val` by name."""

    train: Source
    val: Source | None
    more_val: dict[str, Source]


def open_training(config: Config, folder: Path) -> Source:
    """Open the training images only, and check the batch size against them. Called by all ranks.

    Raises:
        ValueError: On all ranks; see `open_sources` and `check_batch`.
    """
    train = open_sources(config.data.model_copy(update={"val": None, "more_val": None}), folder).train
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
    if config.data.evaluation_backend_for(device) == "dali":
        return needed + shared_memory.dali_bytes(train, batch_size, config.data, workers)
    return needed + shared_memory.evaluation_bytes(image_size(config), batch_size, workers)


def open_sources(data: DataSettings, folder: Path, *, record: bool = False) -> Sources:
    """Open the training images and the validation images that are set. Called by all ranks.

    Args:
        data: The section `data` of the configuration.
        folder: Run directory, where the indices of the images are stored, and the record of those that the run uses.
        record: Write that record.

    Raises:
        ValueError: On all ranks, if a rank cannot open the images or finds other images than rank 0 or than the run has
            recorded, or if the validation images have classes that the training images lack.
    """
    sources: dict[str, Source] = {}
    found: dict[str, Fingerprint] = {}

    def check(name: str, source: Source) -> None:
        found[name] = fingerprint(source)
        check_images(folder, data, name, found[name])

    for turn in (True, False):  # rank 0 may list millions of files; the other ranks then read the stored index
        error = None
        try:
            if (dist.get_rank() == 0) == turn:
                for name, path in data.paths.items():
                    index = folder / f"index-{name}.npz"
                    sources[name] = open_source(path, index, lambda source, name=name: check(name, source))  # type: ignore[misc]
        except (ValueError, OSError) as cause:
            error = str(cause) if str(cause).startswith("data.") else f"data: {cause}"
        raise_on_all_ranks(error)
    train = sources["train"]
    for name, source in sources.items():
        if unknown := sorted(set(source.classes) - set(train.classes)):
            listed = ", ".join(unknown[:3])
            error = f"data.{name}: {data.paths[name]} has classes that {data.train} does not have: {listed}"
    raise_on_all_ranks(error)
    for name, source in sources.items():
        raise_on_all_ranks(_compare_with_rank_0(f"data.{name}", source, found[name], data.max_unreadable))
    if record:
        raise_on_all_ranks(_record(folder, data, found) if dist.get_rank() == 0 else None)
    more_val = {name: sources[f"more_val.{name}"] for name in data.more_val or {}}
    return Sources(train, sources.get("val"), more_val)


def _compare_with_rank_0(name: str, source: Source, found: Fingerprint, max_unreadable: float) -> str | None:
    """Return an error message if this rank finds other images than rank 0, or lacks the files of the list of rank 0."""
    first = [found]
    dist.broadcast_object_list(first)
    if found != first[0]:
        return f"{name}: this rank finds {describe(found)}, rank 0 {difference(found, first[0])}"
    # A rank of another node may have read the list that rank 0 stored, and not its own folder.
    if isinstance(source, ImageFolder) and os.environ.get("LOCAL_RANK", "0") == "0":
        missing, count = source.missing(SPOT_CHECKS), min(SPOT_CHECKS, len(source))
        if len(missing) > max_unreadable * max(count, 1000):  # as in `trainer.run.unreadable`
            where = f"{source.root} on {socket.gethostname()}"
            return f"{name}: {where} lacks {len(missing)} of {count} images that were listed, such as {missing[0]}"
    return None


def _record(folder: Path, data: DataSettings, found: dict[str, Fingerprint]) -> str | None:
    """Write the record of the images; return an error message if the file system refuses."""
    try:
        record_images(folder, data, found)
    except OSError as error:
        return f"images not recorded: {error}"
    return None
