"""A folder of images, root/class/**/image.jpg: the layout of ImageNet and torchvision."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources.base import UnreadableImage
from data.sources.files import read_file
from data.sources.index import SCAN_THREADS, Listing

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp")


class ImageFolder(Listing):
    """The images under a folder, sorted by path. The classes are the sorted names of its subfolders.

    Hidden files and folders are ignored. Images directly in the root, without class folders, form one class.
    """

    @classmethod
    def scan(cls, root: Path) -> "ImageFolder":
        """List the images under `root`. Raises ValueError if there are none, or no clear classes.

        The paths of one class at a time are Python objects; those of the others are bytes in a block.
        """
        top = os.fsencode(root)
        with os.scandir(top) as entries:
            folders = sorted(e.name for e in entries if not e.name.startswith(b".") and e.is_dir())
        loose = _find_images(top, b"", recurse=False)
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            by_class = list(pool.map(lambda folder: _join(_find_images(top, folder + b"/")), folders))
        if any(len(sizes) for _, sizes in by_class):
            if loose:
                raise ValueError(
                    f"{root} has images both in class folders and outside them (such as {os.fsdecode(loose[0])}): "
                    "put every image in a class folder, or none"
                )
            classes = [os.fsdecode(folder) for folder in folders]
        elif loose:
            classes, by_class = [root.resolve().name], [_join(loose)]
        else:
            raise ValueError(
                f"{root} has no images: it needs class/image.jpg (or "
                f"{', '.join(e.decode() for e in EXTENSIONS[1:])}), or shards (.tar, .arrow, .parquet) inside; for IDX "
                "data give the path of the *-images-idx3-ubyte[.gz] file"
            )
        labels = np.repeat(np.arange(len(classes)), [len(sizes) for _, sizes in by_class])
        names = np.frombuffer(bytearray().join(paths for paths, _ in by_class), np.uint8)
        offsets = np.zeros(len(labels) + 1, np.int64)
        np.cumsum(np.concatenate([sizes for _, sizes in by_class]), out=offsets[1:])
        return cls(root, classes, labels, names, offsets)

    def changed_since(self, seconds: float) -> bool:
        """Return whether an entry of the root or of a class folder was added, removed or renamed since a time.

        Folders deeper than the class folders are not looked at.
        """
        with os.scandir(self.root) as entries:
            folders = [os.fspath(self.root), *(entry.path for entry in entries if entry.is_dir())]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            return any(pool.map(lambda folder: os.stat(folder).st_mtime >= seconds, folders))

    def missing(self, count: int) -> list[str]:
        """Return those of `count` images, evenly spread over the list, that do not exist."""
        names = [self.name(i) for i in np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64)).tolist()]
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = pool.map(lambda name: os.path.exists(os.path.join(self.root, name)), names)
            return [name for name, exists in zip(names, found, strict=True) if not exists]

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image i. Raises UnreadableImage."""
        name = self.name(i)
        try:
            return read_file(os.path.join(self.root, name))
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror}") from error


def _join(paths: list[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    """Return the paths one after another, and the length of each."""
    return b"".join(paths), np.fromiter(map(len, paths), np.int64, len(paths))


def _find_images(top: bytes, folder: bytes, recurse: bool = True) -> list[bytes]:
    """Return the sorted paths, relative to `top`, of the images in `folder`, which is empty or ends in a slash."""
    found: list[bytes] = []
    with os.scandir(os.path.join(top, folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                found.append(folder + entry.name)
            elif recurse and entry.is_dir():
                found += _find_images(top, folder + entry.name + b"/")
    return sorted(found)
