"""Where the pictures are: what may be given as a data set, and the source that reads it.

folder      class/**/picture.jpg (or .jpeg .png .webp .bmp), see `data.sources.folder`
.tar        shards in WebDataset's layout, see `data.sources.tar`
.arrow      Hugging Face `save_to_disk`, see `data.sources.arrow`
.parquet    likewise
.bin        CIFAR's binary version, see `data.sources.cifar`
idx         *-images-idx3-ubyte[.gz], see `data.sources.idx`
.npz        an index that `python -m trainer data index` wrote

Several files are given as their folder or as a pattern: "train-*.tar", "train-{000..146}.tar".
"""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from data.decode import decode
from data.sources.arrow import ParquetFiles, scan_arrow
from data.sources.base import Source, UnreadableImage
from data.sources.cifar import TRAINING, CifarBinary
from data.sources.folder import EXTENSIONS, ImageFolder
from data.sources.idx import IdxImages
from data.sources.index import Listing, Packed, Part, read_index
from data.sources.tar import scan_shard

__all__ = ["IdxImages", "ImageFolder", "Listing", "Source", "UnreadableImage", "decode", "open_source"]

PACKED: dict[str, Callable[[Path], Part]] = {".tar": scan_shard, ".arrow": scan_arrow}
SHARDS = {".tar", ".arrow", ".parquet"}
PICTURES = tuple(extension.decode() for extension in EXTENSIONS)
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(path: str | Path, index: Path | None = None) -> Source:
    """The data set at `path`, see the module.

    For a folder and shards, `index` names a file that keeps the listing: it is written after the first scan and read
    instead of scanning from then on. Delete it when the data change. Raises ValueError if there is nothing usable.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        root, arrays = read_index(path)
        return (Packed if "files" in arrays else ImageFolder).from_arrays(arrays, root)
    files = find_files(path)
    suffix = files[0].suffix if files else ""
    if suffix == ".parquet":
        return ParquetFiles(path, files)
    if suffix == ".bin":
        return CifarBinary(files)
    if suffix not in PACKED and not path.is_dir():
        return IdxImages(path)
    kind = Packed if suffix in PACKED else ImageFolder
    listing = kind.load(index, path) if index else None
    if listing is None:
        listing = Packed.scan(path, files, PACKED[suffix]) if suffix in PACKED else ImageFolder.scan(path)
        if index:
            listing.save(index)
    return listing


def find_files(path: Path) -> list[Path]:
    """The files that `path` stands for, sorted: itself, those of a pattern, or the shards in a folder.

    A folder of pictures gives []. Raises ValueError if nothing is there, or different things.
    """
    if path.is_dir():
        return _shards(path)
    if path.is_file():
        return [path]
    files: list[Path] = []
    for pattern in _expand(str(path)):
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        if not found:
            raise ValueError(
                f"{pattern} does not exist: give a folder of class/picture.jpg, shards (.tar, .arrow, .parquet, or a "
                "pattern such as train-{000..146}.tar), CIFAR's .bin, or a *-images-idx3-ubyte[.gz] file"
            )
        files += map(Path, found)
    kinds = {file.suffix for file in files}
    if len(kinds) > 1 or kinds - SHARDS:
        raise ValueError(f"{path} stands for {', '.join(sorted(kinds))} files: need one of {', '.join(sorted(SHARDS))}")
    return files


def _shards(folder: Path) -> list[Path]:
    """The sorted shards in a folder; [] if it has pictures or other folders in it."""
    if (splits := folder / "dataset_dict.json").is_file():
        raise ValueError(f"{folder} holds several data sets ({splits.read_text()[:200]}): give one of them")
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(PICTURES) or entry.is_dir():
                return []
            ending = os.path.splitext(entry.name)[1]
            # datasets keeps its caches as cache-*.arrow beside the data.
            if (ending in SHARDS and not entry.name.startswith("cache-")) or TRAINING.fullmatch(entry.name):
                names.append(entry.name)
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds {', '.join(kinds[:5])}: give the pattern of one, such as {folder}/{kinds[0]}")
    return [folder / name for name in sorted(names)]


def _expand(pattern: str) -> list[str]:
    """a-{08..10} as a-08, a-09, a-10."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    numbers = (f"{k:0{len(match[1])}d}" for k in range(int(match[1]), int(match[2]) + 1))
    return [text for number in numbers for text in _expand(pattern[: match.start()] + number + pattern[match.end() :])]
