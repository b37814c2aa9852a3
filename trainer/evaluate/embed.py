"""Features of a data set as a file for other programs, and a page to look at them.

FEATURES.parquet    columns name, label, feature (a fixed size list of float32), a row a picture
FEATURES.npy        float32 [N, D], and beside it FEATURES.csv with name and label of each row
FEATURES.html       a map of some of them, see `trainer.report.embed_page`

Each rank embeds a part of the data set and writes it down; the first one joins the parts, so that the rows are in the
order of the data set. No rank holds more than a batch or a chunk of the features in memory.

N pictures, D dimensions, P points of the page.
"""

import csv
import logging
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
from trainer import distributed
from trainer.config import Config
from trainer.distributed import RankInfo, raise_on_all_ranks
from trainer.evaluate.features import forward_images
from trainer.interop.weights import CheckpointChoice, load_encoder, to_device
from trainer.report.embed_page import name_and_label, render_embeddings
from trainer.run.directory import read_config
from trainer.run.files import write_atomically
from trainer.run.metrics import set_up_logging

log = logging.getLogger(__name__)

CHUNK = 4096  # rows that are joined at a time

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class Part(NamedTuple):
    """What a rank has embedded, on disk: float32 [n, D] and the int64 [n] samples, as they lie in memory."""

    features: Path
    samples: Path


def embed(run: Path, src: str, out: Path, choice: CheckpointChoice, points: int, overrides: list[str]) -> str:
    """Write the backbone's features of every picture of `src` to `out`, and a page of `points` of them beside it.

    They are as the backbone gives them, not of unit length. `points` 0: no page. Pictures that cannot be read are left
    out, the log says how many. Called by all ranks. Raises ValueError, on all of them, where a file exists or has
    another ending than .parquet or .npy, and where no picture can be read.
    """
    config = read_config(run, overrides)
    with distributed.process_group(config.run.device) as rank_info:
        set_up_logging(rank_info.rank)
        return embed_here(run, config, rank_info, src, out, choice, points)


def embed_here(
    run: Path, config: Config, rank_info: RankInfo, src: str, out: Path, choice: CheckpointChoice, points: int
) -> str:
    """`embed` in a group that there is; '' on all ranks but the first."""
    page = out.with_suffix(".html") if points else None
    new = [out, *([out.with_suffix(".csv")] if out.suffix == ".npy" else []), *([page] if page else [])]
    raise_on_all_ranks(_refusal(out, new) if rank_info.rank == 0 else None)
    encoder, _ = load_encoder(run, config, choice)
    to_device(encoder, rank_info.device)
    source = _open(src)
    mine = np.arange(
        len(source) * rank_info.rank // rank_info.world_size, len(source) * (rank_info.rank + 1) // rank_info.world_size
    )
    with _parts(out, rank_info) as part:
        rows = dims = 0
        with part.features.open("wb") as features, part.samples.open("wb") as samples:
            for x_BD, numbers in forward_images(encoder, encoder.backbone, source, mine, rank_info.device, config):
                x_BD.cpu().numpy().tofile(features)
                numbers.numpy().tofile(samples)
                rows, dims = rows + len(numbers), x_BD.shape[1]
        dims = _agree_on_size(rows, dims, src)
        if rank_info.rank > 0:
            return ""
        parts = [_part(out, rank) for rank in range(rank_info.world_size)]
        total = sum(part.samples.stat().st_size // 8 for part in parts)
        if out.suffix == ".parquet":
            _write_parquet(parts, dims, source, out)
        else:
            _write_npy(parts, dims, total, source, out)
        if page:
            chosen = np.unique(np.linspace(0, total - 1, min(points, total)).astype(np.int64))
            x_PD, samples_P = _rows(parts, dims, chosen)
            title = f"{run.resolve().name}: {Path(src).name}"
            write_atomically(page, render_embeddings(title, x_PD, samples_P, source, total))
    return f"{total:,} of {len(source):,} images, {dims} features each: {', '.join(map(str, new))}"


def _refusal(out: Path, new: list[Path]) -> str | None:
    if out.suffix not in (".parquet", ".npy"):
        return f"{out}: the name must end in .parquet or .npy"
    there = [str(path) for path in new if path.exists()]
    return f"{', '.join(there)} exists: choose another name, nothing is overwritten" if there else None


def _open(src: str) -> Source:
    error, source = None, None
    try:
        source = open_source(src)
    except (ValueError, OSError) as refusal:
        error = str(refusal)
    raise_on_all_ranks(error)
    assert source is not None
    count = torch.tensor([len(source), -len(source)])
    dist.all_reduce(count, dist.ReduceOp.MAX)
    raise_on_all_ranks(
        None if count[0] == -count[1] else f"{src}: ranks find different numbers of images, here {len(source)}"
    )
    return source


def _agree_on_size(rows: int, dims: int, src: str) -> int:
    """D, also for a rank that could read nothing; ValueError if that is all of them."""
    most = torch.tensor([rows, dims])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    raise_on_all_ranks(None if most[0] else f"{src}: none of the images can be read")
    return int(most[1])


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def _part(out: Path, rank: int) -> Part:
    return Part(_folder(out) / f"{rank}.float32", _folder(out) / f"{rank}.int64")


@contextmanager
def _parts(out: Path, rank_info: RankInfo) -> Iterator[Part]:
    """The files of this rank, in a folder beside `out` that all ranks see and that is gone afterwards."""
    if rank_info.rank == 0:
        shutil.rmtree(_folder(out), ignore_errors=True)  # of one that was killed
        _folder(out).mkdir(parents=True)
    dist.barrier()
    try:
        yield _part(out, rank_info.rank)
    finally:
        if rank_info.rank == 0:
            shutil.rmtree(_folder(out), ignore_errors=True)


def _chunks(parts: list[Part], dims: int) -> Iterator[tuple[Float32, Int64]]:
    """All rows in order, at most CHUNK at a time: [n, D], [n]."""
    for part in parts:
        with part.features.open("rb") as features, part.samples.open("rb") as samples:
            while len(numbers := np.fromfile(samples, np.int64, CHUNK)):
                yield np.fromfile(features, np.float32, len(numbers) * dims).reshape(-1, dims), numbers


def _rows(parts: list[Part], dims: int, chosen: Int64) -> tuple[Float32, Int64]:
    """The rows with these numbers, ascending: [P, D], [P]."""
    xs, numbers, start = [], [], 0
    for x_ND, samples_N in _chunks(parts, dims):
        here = chosen[(chosen >= start) & (chosen < start + len(samples_N))] - start
        xs.append(x_ND[here])
        numbers.append(samples_N[here])
        start += len(samples_N)
    return np.concatenate(xs), np.concatenate(numbers)


def _write_parquet(parts: list[Part], dims: int, source: Source, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    feature = pa.list_(pa.float32(), dims)
    schema = pa.schema([("name", pa.string()), ("label", pa.string()), ("feature", feature)])
    partial = _folder(out) / out.name
    with pq.ParquetWriter(partial, schema) as writer:
        for x_ND, samples_N in _chunks(parts, dims):
            names, labels = zip(*(name_and_label(source, i) for i in samples_N.tolist()), strict=True)
            rows = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), type=feature)
            writer.write_table(pa.table([pa.array(names), pa.array(labels), rows], schema=schema))
    os.rename(partial, out)


def _write_npy(parts: list[Part], dims: int, total: int, source: Source, out: Path) -> None:
    partial, table = _folder(out) / out.name, _folder(out) / "rows.csv"
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (total, dims)}
    with partial.open("wb") as file, table.open("w", encoding="utf-8", newline="") as text:
        np.lib.format.write_array_header_1_0(file, header)
        rows = csv.writer(text)
        rows.writerow(["name", "label"])
        for x_ND, samples_N in _chunks(parts, dims):
            x_ND.tofile(file)
            rows.writerows(name_and_label(source, i) for i in samples_N.tolist())
    os.rename(table, out.with_suffix(".csv"))
    os.rename(partial, out)
