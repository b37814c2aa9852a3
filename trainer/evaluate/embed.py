"""Features of a data set as a file for other programs, and a page to look at them.

FEATURES.parquet    columns name, label and feature (fixed-size list of float32), one row per image
FEATURES.npy        float32 [N, D], with the name and label of each row in FEATURES.csv
FEATURES.html       a map of some images, see `trainer.report.embed_page`

Each rank embeds a range of the images and writes temporary files; rank 0 joins them in the order of the data set. No
rank holds more than a batch or a chunk of the features in memory.

Shape suffixes: N images, D dimensions, P images on the page.
"""

import csv
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.sources.base import Source
from data.sources.open import open_source
from trainer.build import check_image_sizes
from trainer.config import Config
from trainer.distributed import RankInfo, process_group, raise_on_all_ranks
from trainer.evaluate.features import forward_images, image_size
from trainer.interop.weights import CheckpointChoice, load_encoder, to_device
from trainer.report.embed_page import name_and_label, render_embeddings
from trainer.run.directory import read_config
from trainer.run.files import write_atomically
from trainer.run.metrics import set_up_logging

CHUNK = 4096  # rows that are joined at a time

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class RankFiles(NamedTuple):
    """The temporary files of a rank: raw float32 [n, D] features, and raw int64 [n] indices of their images."""

    features: Path
    samples: Path


def embed(run: Path, src: str, out: Path, choice: CheckpointChoice, points: int, overrides: list[str]) -> str:
    """Write the features of all images of a data set to a file. See `embed_source`."""
    config = read_config(run, overrides)
    with process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        return embed_source(run, config, rank_info, src, out, choice, points)


def embed_source(
    run: Path, config: Config, rank_info: RankInfo, src: str, out: Path, choice: CheckpointChoice, points: int
) -> str:
    """Write the backbone's features, which are not normalised, of all readable images of a data set. Collective.

    Args:
        run: The run directory.
        config: Its configuration, with overrides.
        rank_info: This process.
        src: The data set, as in data.train.
        out: The new file, .parquet or .npy.
        choice: Network and checkpoint.
        points: Number of images on the page beside `out`; 0 for no page.

    Returns:
        A summary on rank 0, '' on other ranks.

    Raises:
        ValueError: On all ranks, if a file exists, `out` has another extension, or no image can be read.
    """
    page = out.with_suffix(".html") if points else None
    new = [out, *([out.with_suffix(".csv")] if out.suffix == ".npy" else []), *([page] if page else [])]
    raise_on_all_ranks(_check_output(out, new) if rank_info.rank == 0 else None)
    encoder, _ = load_encoder(run, config, choice)
    check_image_sizes(encoder, config, {image_size(config)})
    to_device(encoder, rank_info.device)
    source = _open_on_all_ranks(src)
    first, last = (len(source) * rank // rank_info.world_size for rank in (rank_info.rank, rank_info.rank + 1))
    with _temporary_files(out, rank_info) as files:
        rows = dims = 0
        with files.features.open("wb") as features, files.samples.open("wb") as samples:
            for x_BD, batch_samples in forward_images(
                encoder, encoder.backbone, source, np.arange(first, last), rank_info.device, config
            ):
                x_BD.cpu().numpy().tofile(features)
                batch_samples.numpy().tofile(samples)
                rows, dims = rows + len(batch_samples), x_BD.shape[1]
        largest = torch.tensor([rows, dims])  # a rank without readable images does not know D
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        raise_on_all_ranks(None if largest[0] else f"{src}: none of the images can be read")
        if rank_info.rank > 0:
            return ""
        dims = int(largest[1])
        parts = [_rank_files(out, rank) for rank in range(rank_info.world_size)]
        total = sum(part.samples.stat().st_size // 8 for part in parts)
        if out.suffix == ".parquet":
            _write_parquet(parts, dims, source, out)
        else:
            _write_npy(parts, dims, total, source, out)
        if page:
            chosen = np.unique(np.linspace(0, total - 1, min(points, total)).astype(np.int64))
            x_PD, samples_P = _read_rows(parts, dims, chosen)
            title = f"{run.resolve().name}: {Path(src).name}"
            write_atomically(page, render_embeddings(title, x_PD, samples_P, source, total))
    return f"{total:,} of {len(source):,} images, {dims} features each: {', '.join(map(str, new))}"


def _check_output(out: Path, new: list[Path]) -> str | None:
    """Return an error message if the files cannot be written."""
    if out.suffix not in (".parquet", ".npy"):
        return f"{out}: the name must end in .parquet or .npy"
    existing = [str(path) for path in new if path.exists()]
    return f"{', '.join(existing)} exists: choose another name, nothing is overwritten" if existing else None


def _open_on_all_ranks(src: str) -> Source:
    """Open a data set. Raises ValueError on all ranks if a rank cannot, or if they find different numbers of images."""
    error, source = None, None
    try:
        source = open_source(src)
    except (ValueError, OSError) as cause:
        error = str(cause)
    raise_on_all_ranks(error)
    assert source is not None
    count = torch.tensor([len(source), -len(source)])
    dist.all_reduce(count, dist.ReduceOp.MAX)
    raise_on_all_ranks(
        None if count[0] == -count[1] else f"{src}: the ranks find different numbers of images, this one {len(source)}"
    )
    return source


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def _rank_files(out: Path, rank: int) -> RankFiles:
    return RankFiles(_folder(out) / f"{rank}.float32", _folder(out) / f"{rank}.int64")


@contextmanager
def _temporary_files(out: Path, rank_info: RankInfo) -> Iterator[RankFiles]:
    """Yield this rank's files in a directory beside `out`, which all ranks see and rank 0 deletes afterwards."""
    if rank_info.rank == 0:
        shutil.rmtree(_folder(out), ignore_errors=True)  # from a process that was killed
        _folder(out).mkdir(parents=True)
    dist.barrier()
    try:
        yield _rank_files(out, rank_info.rank)
    finally:
        if rank_info.rank == 0:
            shutil.rmtree(_folder(out), ignore_errors=True)


def _read_chunks(parts: list[RankFiles], dims: int) -> Iterator[tuple[Float32, Int64]]:
    """Yield features [n, D] and indices [n] of all images in order, at most CHUNK at a time."""
    for part in parts:
        with part.features.open("rb") as features, part.samples.open("rb") as samples:
            while len(numbers := np.fromfile(samples, np.int64, CHUNK)):
                yield np.fromfile(features, np.float32, len(numbers) * dims).reshape(-1, dims), numbers


def _read_rows(parts: list[RankFiles], dims: int, rows: Int64) -> tuple[Float32, Int64]:
    """Return features [P, D] and indices [P] of the images in the given rows, which ascend."""
    xs, numbers, start = [], [], 0
    for x_ND, samples_N in _read_chunks(parts, dims):
        here = rows[(rows >= start) & (rows < start + len(samples_N))] - start
        xs.append(x_ND[here])
        numbers.append(samples_N[here])
        start += len(samples_N)
    return np.concatenate(xs), np.concatenate(numbers)


def _write_parquet(parts: list[RankFiles], dims: int, source: Source, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    feature = pa.list_(pa.float32(), dims)
    schema = pa.schema([("name", pa.string()), ("label", pa.string()), ("feature", feature)])
    partial = _folder(out) / out.name
    with pq.ParquetWriter(partial, schema) as writer:
        for x_ND, samples_N in _read_chunks(parts, dims):
            names, labels = zip(*(name_and_label(source, i) for i in samples_N.tolist()), strict=True)
            rows = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), type=feature)
            writer.write_table(pa.table([pa.array(names), pa.array(labels), rows], schema=schema))
    os.rename(partial, out)


def _write_npy(parts: list[RankFiles], dims: int, total: int, source: Source, out: Path) -> None:
    partial, table = _folder(out) / out.name, _folder(out) / "rows.csv"
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (total, dims)}
    with partial.open("wb") as file, table.open("w", encoding="utf-8", newline="") as text:
        np.lib.format.write_array_header_1_0(file, header)
        rows = csv.writer(text)
        rows.writerow(["name", "label"])
        for x_ND, samples_N in _read_chunks(parts, dims):
            x_ND.tofile(file)
            rows.writerows(name_and_label(source, i) for i in samples_N.tolist())
    os.rename(table, out.with_suffix(".csv"))
    os.rename(partial, out)
