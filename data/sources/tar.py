"""Tar shards in WebDataset's layout.

Members with the same key (the path up to the first dot of the file name) belong together: 000123.jpg, 000123.cls. Every
image is a sample. Its label is the first that exists of the text of the .cls member, "label" in the .json member, and
the folder in the key. Layout: https://github.com/webdataset/webdataset
"""

import json
import os
import tarfile
from pathlib import Path

import numpy as np

from data.sources.folder import EXTENSIONS
from data.sources.shards import ShardContents

MAX_LABEL_BYTES = 1 << 20


def scan_tar(file: Path) -> ShardContents:
    """List the images in a tar file. Raises ValueError if it is damaged or compressed."""
    names: list[str] = []
    ranges: list[tuple[int, int]] = []
    stored: dict[str, str] = {}  # label of a key, from .cls or .json
    try:
        with tarfile.open(file, "r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                name = member.name.removeprefix("./")
                ending = os.path.splitext(name)[1].lower()
                if not member.isreg() or os.path.basename(name).startswith("."):
                    continue
                if os.fsencode(ending) in EXTENSIONS:
                    names.append(name)
                    ranges.append((member.offset_data, member.size))
                elif ending in (".cls", ".json"):
                    label = _label(tar, member, ending)
                    if label is not None and (ending == ".cls" or _key(name) not in stored):
                        stored[_key(name)] = label
            _check_end(tar)
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is damaged, cut short, or not an uncompressed tar ({error}): compressed shards cannot be read "
            "by offset, unpack them with gunzip"
        ) from error
    keys: dict[str, int] = {}
    labels = []
    for name in names:
        key = _key(name)
        label = stored.get(key) or os.path.basename(os.path.dirname(key))
        labels.append(keys.setdefault(label, len(keys)) if label else -1)
    starts, sizes = np.array(ranges, np.int64).reshape(-1, 2).T
    return ShardContents(names, list(keys), np.array(labels, np.int64), starts, sizes)


def _key(name: str) -> str:
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> str | None:
    """Return the label in a .cls or .json member; None if it has none, or -1. Raises TarError if it is damaged."""
    if member.size > MAX_LABEL_BYTES:
        return None
    assert tar.fileobj is not None
    tar.fileobj.seek(member.offset_data)
    try:
        text = tar.fileobj.read(member.size).decode("utf-8")
        values = {"label": text.strip()} if ending == ".cls" else json.loads(text)
    except ValueError as error:
        raise tarfile.ReadError(f"{member.name} is not {'text' if ending == '.cls' else 'JSON'}: {error}") from error
    label = values.get("label") if isinstance(values, dict) else None
    return str(label) if isinstance(label, int | str) and label not in ("", "-1", -1) else None


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise TarError unless the archive ends where tarfile stopped: tarfile takes a damaged header for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
