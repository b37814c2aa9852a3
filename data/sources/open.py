"""Opens a data set given by a path.

folder      class/**/image.jpg (or .jpeg .png .webp .bmp), see `data.sources.folder`
.tar        shards in WebDataset's layout, see `data.sources.tar`
.arrow      Hugging Face `save_to_disk`, see `data.sources.arrow`
.parquet    likewise, see `data.sources.parquet`
.bin        CIFAR's binary version, see `data.sources.cifar`
idx         *-images-idx3-ubyte[.gz], see `data.sources.idx`
.npz        an index that `python -m trainer data index` wrote
.py:NAME    a map-style torch Dataset of a Python file, see `data.sources.dataset`

Several files are given as their folder or as a pattern: "train-*.tar", "train-{000..146}.tar". A new format is a module
here and a line in SHARD_FORMATS, if its images can be read by offset, or in OTHER_FORMATS.
"""

import glob
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from data.names import read_lines
from data.references import is_reference
from data.sources.arrow import scan_arrow
from data.sources.base import Source
from data.sources.cifar import TRAINING, CifarBinary
from data.sources.dataset import ReferredDataset
from data.sources.folder import ImageFolder
from data.sources.idx import IdxImages
from data.sources.index import Listing, read_index
from data.sources.parquet import ParquetFiles
from data.sources.selection import EXTENSIONS, is_hidden
from data.sources.shards import ShardContents, Shards
from data.sources.tar import scan_tar

# By suffix: the function that lists the images in a file.
SHARD_FORMATS: dict[str, Callable[[Path], ShardContents]] = {".tar": scan_tar, ".arrow": scan_arrow}
# By suffix: the function that opens the files that a path stands for.
OTHER_FORMATS: dict[str, Callable[[Path, list[Path]], Source]] = {
    ".parquet": ParquetFiles,
    ".bin": lambda path, files: CifarBinary(files),
}
SUFFIXES = {*SHARD_FORMATS, *OTHER_FORMATS}
IMAGE_SUFFIXES = tuple(extension.decode() for extension in EXTENSIONS)
log = logging.getLogger(__name__)

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(
    path: str | Path, index: Path | None = None, check: Callable[[Source], None] = lambda source: None
) -> Source:
    """Open the data set at `path`.

    Args:
        path: A folder, file or pattern of the formats above.
        index: For a folder and shards, a file that stores their list. It is written after the first scan and replaces
            later scans until the folder changes (see `data.sources.folder`).
        check: Is called with the source before the index is written; may raise ValueError.

    Raises:
        ValueError: There is no usable data set.
    """
    path = Path(path)
    source: Source | None = None
    if path.suffix == ".npz" and path.is_file():
        source = _open_index(path)
    elif ".py:" in path.name and is_reference(str(path)):
        source = ReferredDataset(str(path))
    if source is not None:
        check(source)
        return source
    files = find_files(path)
    suffix = files[0].suffix.lower() if files else ""
    if files and suffix not in SHARD_FORMATS:
        source = OTHER_FORMATS[suffix](path, files) if suffix in OTHER_FORMATS else IdxImages(path)
        check(source)
        return source
    stored = (Shards if files else ImageFolder).load(index, path) if index else None
    if isinstance(stored, Shards) and not stored.consists_of(files):
        stored = None
    listing = stored or (Shards.scan(path, files, SHARD_FORMATS[suffix]) if files else ImageFolder.scan(path))
    check(listing)
    if index and stored is None:
        listing.save(index)
    return listing


def _open_index(path: Path) -> Listing:
    root, arrays = read_index(path)
    listing: Listing = (Shards if "files" in arrays else ImageFolder).from_arrays(arrays, root)
    if listing.changed_since(path.stat().st_mtime):
        log.warning("%s may have changed since %s was written: python -m trainer data index lists it again", root, path)
    return listing


def find_files(path: Path) -> list[Path]:
    """Return the sorted files that `path` stands for: itself, those of a pattern, or the shards in a folder.

    The result is empty for a folder of images.

    Raises:
        ValueError: There are no files, or they have different formats.
    """
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        return [path]
    files: list[Path] = []
    for pattern in _expand(str(path)):
        folder, name = os.path.split(pattern)
        # Brackets in the name of a folder that exists are no pattern.
        found = sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)))
        if not found:
            raise ValueError(
                f"{Path(pattern).absolute()} does not exist: give a folder of class/image.jpg, shards (.tar, .arrow, "
                ".parquet, or a pattern such as train-{000..146}.tar), CIFAR's .bin, or a *-images-idx3-ubyte[.gz] file"
            )
        files += map(Path, found)
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1 or suffixes - SUFFIXES:
        found_suffixes, known = (", ".join(sorted(some)) for some in (suffixes, SUFFIXES))
        raise ValueError(f"{path} stands for {found_suffixes} files: need one of {known}")
    return files


def _files_in(folder: Path) -> list[Path]:
    """Return the sorted data files in a folder, or [] if it has images or other folders in it."""
    if (splits := folder / "dataset_dict.json").is_file():
        raise ValueError(f"{folder} holds several data sets ({' '.join(read_lines(splits))[:200]}): give one of them")
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(os.fsencode(entry.name)):
                continue
            if entry.name.lower().endswith(IMAGE_SUFFIXES) or entry.is_dir():
                return []
            if _is_training_data(entry.name):
                names.append(entry.name)
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds {', '.join(kinds[:5])}: give the pattern of one, such as {folder}/{kinds[0]}")
    return [folder / name for name in sorted(names)]


def _is_training_data(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".bin":
        return bool(TRAINING.fullmatch(name))
    return suffix in SUFFIXES and not name.startswith("cache-")  # `datasets` stores its caches as cache-*.arrow


def _expand(pattern: str) -> list[str]:
    """Expand a-{08..10} to a-08, a-09, a-10."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    numbers = (f"{k:0{len(match[1])}d}" for k in range(int(match[1]), int(match[2]) + 1))
    return [text for number in numbers for text in _expand(pattern[: match.start()] + number + pattern[match.end() :])]
