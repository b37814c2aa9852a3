"""A folder of images, root/class/**/image.jpg: the layout of ImageNet and torchvision."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.names import to_text
from data.sources.base import UnreadableImage
from data.sources.files import read_file
from data.sources.index import SCAN_THREADS, Listing, log_listing
from data.sources.selection import EMPTY, EXTENSIONS, HIDDEN, LOOP, OTHER, SPECIAL, LeftOut, is_hidden


class ImageFolder(Listing):
    """The images under a folder, sorted by path. The classes are the sorted names of its subfolders with images.

    Hidden files and folders and those of the system are ignored. Images directly in the root, without class folders,
    form one class.
    """

    @classmethod
    def scan(cls, root: Path) -> "ImageFolder":
        """List the images under `root`. Raises ValueError if there are none, or no clear classes.

        The paths of one class at a time are Python objects; those of the others are bytes in a block.
        """
        top = os.fsencode(root)
        scans = [FolderScan(top)]
        loose, folders = scans[0].list_folder(b"")
        scans += [FolderScan(top) for _ in folders]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            blocks = list(pool.map(lambda scan, folder: _join(scan.find_images(folder)), scans[1:], folders))
        left_out = LeftOut()
        for scan in scans:
            left_out.update(scan.left_out)
        found = {folder: block for folder, block in zip(folders, blocks, strict=True) if len(block[1])}
        for folder in folders:
            if folder not in found:
                left_out.add(EMPTY, folder)
        if found and loose:
            raise ValueError(
                f"{root} has images both in class folders and outside them (such as {to_text(loose[0])}): "
                "put every image in a class folder, or none"
            )
        if loose:
            found = {os.fsencode(root.resolve().name): _join(loose)}
        if not found:
            raise ValueError(
                f"{root} has no images: it needs class/image.jpg (or "
                f"{', '.join(e.decode() for e in EXTENSIONS[1:])}), or shards (.tar, .arrow, .parquet) inside; for IDX "
                f"data give the path of the *-images-idx3-ubyte[.gz] file. Left out: {left_out}"
            )
        classes, by_class = [to_text(folder) for folder in found], found.values()
        labels = np.repeat(np.arange(len(classes)), [len(sizes) for _, sizes in by_class])
        names = np.frombuffer(bytearray().join(paths for paths, _ in by_class), np.uint8)
        offsets = np.zeros(len(labels) + 1, np.int64)
        np.cumsum(np.concatenate([sizes for _, sizes in by_class]), out=offsets[1:])
        source = cls(root, classes, labels, names, offsets)
        log_listing(root, source, left_out)
        return source

    def changed_since(self, seconds: float) -> bool:
        """Return whether an entry of the root or of a class folder was added, removed or renamed since a time.

        Folders deeper than the class folders are not looked at.
        """
        top = os.fsencode(self.root)
        with os.scandir(top) as entries:
            folders = [top, *(entry.path for entry in entries if _is_folder(entry))]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            return any(pool.map(lambda folder: os.stat(folder).st_mtime >= seconds, folders))

    def missing(self, count: int) -> list[str]:
        """Return the names of those of `count` images, evenly spread over the list, that do not exist."""
        samples = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64)).tolist()
        paths = [os.path.join(os.fsencode(self.root), self.stored_name(i)) for i in samples]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            return [
                self.name(i) for i, found in zip(samples, pool.map(os.path.exists, paths), strict=True) if not found
            ]

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image i. Raises UnreadableImage."""
        try:
            return read_file(os.path.join(os.fsencode(self.root), self.stored_name(i)))
        except OSError as error:
            raise UnreadableImage(f"{self.name(i)}: {error.strerror}") from error


class FolderScan:
    """Lists folders under `top`, and counts what it leaves out. Folders are given by their path relative to `top`."""

    def __init__(self, top: bytes) -> None:
        self.top = top
        self.left_out = LeftOut()

    def find_images(self, folder: bytes, above: tuple[bytes, ...] = (b"",)) -> list[bytes]:
        """Return the sorted paths of the images in `folder` and in the folders inside it.

        A link to one of the folders `above`, which contain `folder`, would be followed forever, and is left out.
        """
        path = self._path(folder)
        if os.path.islink(path) and any(os.path.samefile(path, self._path(other)) for other in above):
            self.left_out.add(LOOP, folder)
            return []
        images, folders = self.list_folder(folder)
        for inner in folders:
            images += self.find_images(inner, (*above, folder))
        return sorted(images)

    def list_folder(self, folder: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return the sorted paths of the images, and of the folders, in `folder`. Raises ValueError if it is closed."""
        images, folders = [], []
        try:
            with os.scandir(self._path(folder)) as entries:
                for entry in entries:
                    path = folder + b"/" + entry.name if folder else entry.name
                    if is_hidden(entry.name):
                        self.left_out.add(HIDDEN, path)
                    elif _is_folder(entry):
                        folders.append(path)
                    elif not entry.name.lower().endswith(EXTENSIONS):
                        self.left_out.add(OTHER, path)
                    elif entry.is_symlink() or entry.is_file():  # a broken link is an unreadable image
                        images.append(path)
                    else:
                        self.left_out.add(SPECIAL, path)
        except OSError as error:
            raise ValueError(f"{to_text(self._path(folder))} cannot be listed: {error.strerror}") from error
        return sorted(images), sorted(folders)

    def _path(self, folder: bytes) -> bytes:
        return os.path.join(self.top, folder)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _join(paths: list[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    """Return the paths one after another, and the length of each."""
    return b"".join(paths), np.fromiter(map(len, paths), np.int64, len(paths))
