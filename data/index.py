"""Where the pictures are: the list of samples of a data set, and how one of them becomes pixels.

Everything behind the `Source` protocol is cheap to hand to worker processes: large arrays travel as shared memory.
"""

import gzip
import logging
import math
import os
import re
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp")

# A damaged file is reported by us, with its name; OpenCV's own line on stderr has none.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class UnreadableImage(Exception):
    """A sample that cannot be decoded; the message has its name and the reason."""


class Source(Protocol):
    """A list of labelled pictures."""

    classes: list[str]

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call sample i in messages."""
        ...

    def read(self, i: int) -> bytes | NDArray[np.uint8]:
        """Sample i as stored: an encoded picture, or uint8 [H, W, 3] RGB pixels. Raises UnreadableImage."""
        ...

    def image(self, i: int) -> NDArray[np.uint8]:
        """Sample i: uint8 [H, W, 3] RGB. Raises UnreadableImage."""
        ...


class SharedArray:
    """An array that worker processes map rather than copy: the first pickling moves it to shared memory.

    An index of 14 M files is half a gigabyte, and a node starts a hundred workers.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self._tensor = torch.from_numpy(array)

    @property
    def array(self) -> NDArray[Any]:
        # Not kept: moving to shared memory would leave an earlier view of the storage dangling.
        return self._tensor.numpy()

    def __getstate__(self) -> torch.Tensor:
        return self._tensor.share_memory_()

    def __setstate__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor


def decode(data: bytes) -> NDArray[np.uint8]:
    """An encoded picture as uint8 [H, W, 3] RGB, upright (EXIF orientation applied), alpha dropped.

    What Pillow's `exif_transpose` and `convert("RGB")` give, but 16-bit grey keeps its high byte, where Pillow clips.
    Raises ValueError with the reason if the picture is damaged or of an unknown kind.
    """
    if not data:
        raise ValueError("the file is empty")
    # simplejpeg is a fifth faster than OpenCV, but does not turn a picture that has an EXIF orientation.
    if data.startswith(b"\xff\xd8") and data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # it also refuses what Pillow and OpenCV take, such as stray bytes between two markers
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:  # such as more pixels than OpenCV allows
        raise ValueError(error.err) from error
    if image is None:
        raise ValueError("damaged, cut short, or not an image that OpenCV can read")
    return image


class ImageFolder:
    """A folder of pictures, root/class/**/image.jpg: the layout of ImageNet and torchvision.

    Classes are the sorted names of the root's folders, samples are sorted by path; hidden files and folders are
    ignored. Pictures directly in the root, without class folders, are one class. Paths are kept as one block of bytes.
    """

    def __init__(
        self,
        root: Path,
        classes: list[str],
        labels: NDArray[np.int64],
        names: NDArray[np.uint8],
        offsets: NDArray[np.int64],
    ) -> None:
        """The path of sample i, relative to `root`, is the bytes `offsets[i]` to `offsets[i + 1]` of `names`."""
        self.root = root
        self.classes = classes
        self._labels = SharedArray(labels)
        self._names = SharedArray(names)
        self._offsets = SharedArray(offsets)

    @classmethod
    def scan(cls, root: Path) -> "ImageFolder":
        """Lists the pictures under `root`. Raises ValueError if there are none, or no clear classes."""
        top = os.fsencode(root)
        with os.scandir(top) as entries:
            folders = sorted(e.name for e in entries if not e.name.startswith(b".") and e.is_dir())
        loose = _images(top, b"", recurse=False)
        by_class = [_images(top, folder + b"/") for folder in folders]
        if any(by_class):
            if loose:
                raise ValueError(
                    f"{root} has pictures both in class folders and outside them (such as {os.fsdecode(loose[0])}): "
                    "put every picture in a class folder, or none"
                )
            classes = [os.fsdecode(folder) for folder in folders]
        elif loose:
            classes, by_class = [root.resolve().name], [loose]
        else:
            raise ValueError(
                f"{root} has no pictures: it needs class/picture.jpg (or "
                f"{', '.join(e.decode() for e in EXTENSIONS[1:])}) inside; for IDX data give the path of the "
                "*-images-idx3-ubyte[.gz] file"
            )
        labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in by_class])
        paths = [path for paths in by_class for path in paths]
        offsets = np.cumsum([0, *map(len, paths)])
        return cls(root, classes, labels, np.frombuffer(bytearray().join(paths), np.uint8), offsets)

    @classmethod
    def load(cls, index: Path, root: Path) -> "ImageFolder | None":
        """The listing that `save` wrote to `index`, or None if there is none for this root."""
        try:
            with np.load(index, allow_pickle=False) as saved:
                if saved["root"].tobytes() != os.fsencode(root.resolve()):
                    return None
                classes = [os.fsdecode(name) for name in saved["classes"].tobytes().split(b"/")]
                return cls(root, classes, saved["labels"], saved["names"], saved["offsets"])
        except FileNotFoundError:
            return None
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
            logger.warning("%s is not an index of a folder: scanning again and replacing it", index)
            return None

    def save(self, index: Path) -> None:
        """Writes the listing for `load`, atomically: several ranks may do this at once."""
        index.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=index.parent, prefix=index.name)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    root=np.frombuffer(os.fsencode(self.root.resolve()), np.uint8),
                    classes=np.frombuffer(b"/".join(os.fsencode(name) for name in self.classes), np.uint8),
                    labels=self.labels,
                    names=self._names.array,
                    offsets=self._offsets.array,
                )
            os.replace(temporary, index)
        except BaseException:
            os.unlink(temporary)
            raise

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self._labels.array

    def __len__(self) -> int:
        return len(self._offsets.array) - 1

    def name(self, i: int) -> str:
        """Path of sample i, relative to the root."""
        start, stop = self._offsets.array[i : i + 2].tolist()
        return os.fsdecode(self._names.array[start:stop].tobytes())

    def read(self, i: int) -> bytes:
        """The encoded bytes of sample i. Raises UnreadableImage."""
        name = self.name(i)
        try:
            with open(os.path.join(self.root, name), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror}") from error

    def image(self, i: int) -> NDArray[np.uint8]:
        """Sample i: uint8 [H, W, 3] RGB. Raises UnreadableImage."""
        try:
            return decode(self.read(i))
        except ValueError as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error


def _images(top: bytes, folder: bytes, recurse: bool = True) -> list[bytes]:
    """Sorted paths, relative to `top`, of the pictures in `folder` (which is empty or ends in a slash) and below."""
    found: list[bytes] = []
    with os.scandir(os.path.join(top, folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                found.append(folder + entry.name)
            elif recurse and entry.is_dir():
                found += _images(top, folder + entry.name + b"/")
    return sorted(found)


class IdxImages:
    """Grey pictures in the IDX format of MNIST: x-images-idx3-ubyte[.gz] beside x-labels-idx1-ubyte[.gz].

    Format: http://yann.lecun.com/exdb/mnist/. Everything is read into memory. Classes are called by their numbers, or
    by the lines of a file classes.txt beside.
    """

    PATTERN = re.compile(r"(.*)-images-idx3-ubyte(\.gz)?")

    def __init__(self, path: Path) -> None:
        """Reads both files. Raises ValueError if one is missing, damaged or of another kind."""
        match = self.PATTERN.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"{path} is not named like IDX images: it must be *-images-idx3-ubyte or *-images-idx3-ubyte.gz"
            )
        beside = [path.with_name(f"{match[1]}-labels-idx1-ubyte{end}") for end in (match[2] or "", "", ".gz")]
        labels_path = next((p for p in beside if p.is_file()), None)
        if labels_path is None:
            raise ValueError(f"{path} needs its labels beside it, in {beside[0].name}; there is no such file")
        images, labels = _read_idx(path, 3), _read_idx(labels_path, 1).astype(np.int64)
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(
                f"{path} has {len(images)} images and {labels_path.name} {len(labels)} labels: give as many, not 0"
            )
        self._file = path.name
        self._images, self._labels = SharedArray(images), SharedArray(labels)
        self.classes = [str(label) for label in range(labels.max() + 1)]
        if (names := path.with_name("classes.txt")).is_file():
            self.classes = names.read_text(encoding="utf-8").split("\n")[:-1]
            if labels.max() >= len(self.classes):
                raise ValueError(
                    f"{names} has {len(self.classes)} lines, but {labels_path.name} has label {labels.max()}"
                )

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [n], indices into `classes`."""
        return self._labels.array

    def __len__(self) -> int:
        return len(self._labels.array)

    def name(self, i: int) -> str:
        """The file and the number in it."""
        return f"{self._file}[{i}]"

    def read(self, i: int) -> NDArray[np.uint8]:
        """Sample i: uint8 [H, W, 3], the grey value in all channels."""
        return self.image(i)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Sample i: uint8 [H, W, 3], the grey value in all channels."""
        return cv2.cvtColor(self._images.array[i], cv2.COLOR_GRAY2RGB)


def _read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """The uint8 array of `dims` dimensions in an IDX file, gzipped or not. Raises ValueError if it is another thing."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:  # gzip's own BadGzipFile is an OSError
        raise ValueError(f"{path} cannot be read: {error}") from error
    magic = bytes([0, 0, 8, dims])  # 8: unsigned bytes
    header = len(magic) + 4 * dims
    if not data.startswith(magic) or len(data) < header:
        raise ValueError(
            f"{path} is not an IDX file: it must begin with {magic.hex()} and {dims} sizes, "
            f"it begins with {data[:header].hex()}"
        )
    shape = np.frombuffer(data, ">u4", dims, len(magic)).tolist()
    if len(data) - header != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: its header says {shape}, so {math.prod(shape)} bytes, but it has {len(data) - header}"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(shape)


def open_source(path: str | Path, index: Path | None = None) -> Source:
    """The data set at `path`: a folder of pictures, or an IDX file of images.

    For a folder, `index` names a file that keeps the listing: it is written after the first scan and read instead of
    scanning from then on. Delete it when the folder changes. Raises ValueError if there is nothing usable at `path`.
    """
    path = Path(path)
    if path.is_dir():
        folder = ImageFolder.load(index, path) if index else None
        if folder is None:
            folder = ImageFolder.scan(path)
            if index:
                folder.save(index)
        return folder
    if path.is_file():
        return IdxImages(path)
    raise ValueError(f"{path} does not exist: give a folder of class/picture.jpg or a *-images-idx3-ubyte[.gz] file")
