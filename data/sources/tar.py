"""Tar shards in WebDataset's layout.

Every image is a sample. Its label is the first that exists of the text of its .cls member, "label" in its .json member,
and its folder. The member with the same name up to the last dot belongs to an image: a/shot.001.jpg, a/shot.001.cls.
Without one, the member with the same key does, which is the name up to the first dot, unless it is another image's:
000123.left.jpg, 000123.cls. Layout: https://github.com/webdataset/webdataset

Hard and symbolic links to files of the same archive are read as these files.
"""

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.names import to_text
from data.sources.classes import label_text
from data.sources.selection import EXTENSIONS, HIDDEN, OTHER, SPECIAL, LeftOut, is_hidden
from data.sources.shards import ShardContents

MAX_LABEL_BYTES = 1 << 20
MAX_LINKS = 40  # that lead from a name to a file, as in Linux
IMAGES = tuple(extension.decode() for extension in EXTENSIONS)
LABELS = (".cls", ".json")  # the first counts if an image has both

Range = tuple[int, int]  # offset in the file and size, in bytes


def scan_tar(file: Path) -> ShardContents:
    """List the images in a tar file.

    Raises:
        ValueError: The file is damaged or compressed, members give an image different labels, or an image is sparse or
            a link to what is no file in the archive.
    """
    try:
        with file.open("rb") as opened:
            scan = TarScan(file, opened)
            scan.read_members()
            scan.resolve_links()
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is damaged, cut short, or not an uncompressed tar ({error}): compressed shards cannot be read "
            "by offset, unpack them with gunzip"
        ) from error
    names = [name for name, _ in scan.images]
    keys: dict[str, int] = {}
    labels = [-1 if label is None else keys.setdefault(label, len(keys)) for label in scan.labels.of_images(names)]
    starts, sizes = np.array([place for _, place in scan.images], np.int64).reshape(-1, 2).T
    return ShardContents(names, list(keys), np.array(labels, np.int64), starts, sizes, left_out=scan.left_out)


class TarScan:
    """The images, labels and links in a tar file. Names are decoded with surrogateescape, and normalised: no ./, no //.

    Attributes:
        images: Name and range of each image, in the order of the archive. A link has no range until it is resolved.
        labels: The labels of the .cls and .json members.
        left_out: The other members.
    """

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self.file = file
        self._opened = opened
        self.images: list[tuple[str, Range | None]] = []
        self.labels = Labels(file, opened)
        self.left_out = LeftOut()
        self._links: dict[str, str] = {}  # name of a link and the name that it leads to

    def read_members(self) -> None:
        """Read all headers, and the labels. Raises TarError or ValueError."""
        for name, member in _members(self._opened):
            ending, is_link = _ending(name), member.issym() or member.islnk()
            if is_link:
                folder = posixpath.dirname(name) if member.issym() else ""
                self._links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            if member.isdir():
                continue
            if _is_hidden(name):
                self.left_out.add(HIDDEN, name)
            elif is_link:
                if ending in IMAGES:
                    self.images.append((name, None))
            elif not member.isreg():
                self.left_out.add(SPECIAL, name)
            elif ending in IMAGES:
                self.images.append((name, self._range(name, member)))
            elif ending in LABELS:
                self.labels.read(name, self._range(name, member))
            else:
                self.left_out.add(OTHER, name)

    def resolve_links(self) -> None:
        """Give links to images their ranges, and read the labels that are links. Raises TarError or ValueError."""
        targets = {name: self._follow(name) for name in self._links if not _is_hidden(name)}
        wanted = set(targets.values())
        found: dict[str, Range] = {}
        if wanted:
            for name, member in _members(self._opened):
                if name in wanted and member.isreg():
                    found[name] = self._range(name, member)
        for name, target in targets.items():
            ending = _ending(name)
            # A link without an ending may have been a folder of images.
            if target not in found and ending in (*IMAGES, *LABELS, ""):
                raise ValueError(
                    f"{self.file}: {to_text(name)} is a link to {to_text(self._links[name])}, which is not a file in "
                    "the archive: pack the files themselves, with tar --dereference --hard-dereference"
                )
            if ending in LABELS:
                self.labels.read(name, found[target])
            elif ending not in IMAGES:
                self.left_out.add(OTHER, name)
        self.images = [(name, place or found[targets[name]]) for name, place in self.images]

    def _follow(self, name: str) -> str:
        """Return the name of the file that a link leads to, over other links, to files or to folders."""
        for _ in range(MAX_LINKS):
            parts = name.split("/")
            starts = ("/".join(parts[:k]) for k in range(1, len(parts) + 1))
            link = next((start for start in starts if start in self._links), None)
            if link is None:
                break
            name = posixpath.normpath(self._links[link] + name.removeprefix(link))
        return name

    def _range(self, name: str, member: tarfile.TarInfo) -> Range:
        if member.issparse():
            raise ValueError(f"{self.file}: {to_text(name)} is stored as a sparse file: pack it without tar --sparse")
        return member.offset_data, member.size


class Labels:
    """The labels in the .cls and .json members of a tar file."""

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        self.file = file
        self._descriptor = opened.fileno()
        # By ending: the label of each stem, which is a name up to its last dot.
        self._by_stem: dict[str, dict[str, str]] = {ending: {} for ending in LABELS}

    def read(self, name: str, place: Range) -> None:
        """Read the label in a member, if it has one. Raises TarError if it is damaged, ValueError if it changes."""
        offset, size = place
        if size > MAX_LABEL_BYTES:
            return
        ending = _ending(name)
        try:
            text = os.pread(self._descriptor, size, offset).decode("utf-8-sig")
            values = {"label": text.strip()} if ending == ".cls" else json.loads(text)
        except ValueError as error:
            kind = "text" if ending == ".cls" else "JSON"
            raise tarfile.ReadError(f"{to_text(name)} is not {kind}: {error}") from error
        label = label_text(values.get("label")) if isinstance(values, dict) else None
        if label is not None:
            earlier = self._by_stem[ending].setdefault(_stem(name), label)
            self._require_same({name: label, f"an earlier {name}": earlier}, name)

    def of_images(self, names: list[str]) -> Iterator[str | None]:
        """Yield the label of each image, or None. Raises ValueError if several members give it different labels."""
        stems = {_stem(name) for name in names}
        # By ending and key: the stems with that key, except those of other images. A stem without dots is a key.
        shared: dict[str, dict[str, list[str]]] = {ending: {} for ending in LABELS}
        for ending, labels in self._by_stem.items():
            for stem in labels:
                if stem == _key(stem) or stem not in stems:
                    shared[ending].setdefault(_key(stem), []).append(stem)
        for name in names:
            exact = [labels[_stem(name)] for labels in self._by_stem.values() if _stem(name) in labels]
            yield (
                exact[0] if exact else self._shared(name, shared) or posixpath.basename(posixpath.dirname(name)) or None
            )

    def _shared(self, name: str, shared: dict[str, dict[str, list[str]]]) -> str | None:
        for ending, labels in self._by_stem.items():
            if found := {stem + ending: labels[stem] for stem in shared[ending].get(_key(name), [])}:
                self._require_same(found, name)
                return next(iter(found.values()))
        return None

    def _require_same(self, labels: dict[str, str], name: str) -> None:
        if len(set(labels.values())) > 1:
            texts = " and ".join(f"{to_text(label)!r} ({to_text(member)})" for member, label in labels.items())
            raise ValueError(f"{self.file}: {to_text(name)} has several labels: {texts}")


def _members(opened: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the normalised name and the header of each member. Raises TarError if the archive is damaged."""
    opened.seek(0)
    with tarfile.open(fileobj=opened, mode="r:", encoding="utf-8", errors="surrogateescape", errorlevel=2) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
            yield posixpath.normpath(member.name), member
        _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise TarError unless the archive ends where tarfile stopped: tarfile takes a damaged header for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
    while rest := tar.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(
                f"more data after the end of the archive at byte {tar.offset}, as from cat a.tar b.tar"
            )


def _is_hidden(name: str) -> bool:
    parts = name.encode("utf-8", "surrogateescape").split(b"/")
    return any(is_hidden(part) for part in parts if part not in (b".", b".."))


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])
