"""A map-style `torch.utils.data.Dataset` of images as a source."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.names import to_text
from data.references import resolve
from data.sources.base import LabelledSource, UnreadableImage
from data.sources.classes import number_repeated


class DatasetSource(LabelledSource):
    """The images of a map-style dataset, in its order. Worker processes receive the dataset by pickling."""

    def __init__(self, dataset: Any, title: str) -> None:
        """Wrap a dataset.

        Args:
            dataset: Has `len` and an element for each index: an image, or a tuple that starts with an image, in one of
                the forms that `to_pixels` takes. Labels and class names are read from its attributes `targets` (or
                `labels`) and `classes`, as torchvision's datasets have them; without, all images are of one class.
            title: Its name for messages.

        Raises:
            ValueError: It has no images, or its labels do not fit.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
            raise ValueError(f"{title} is a {type(dataset).__name__}, need a map-style dataset with at least one image")
        targets = getattr(dataset, "targets", None)
        if targets is None:
            targets = getattr(dataset, "labels", None)
        labels = np.zeros(len(dataset), np.int64) if targets is None else np.asarray(targets)
        if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(
                f"{title}: its labels are {labels.dtype} of shape {list(labels.shape)}, need {len(dataset)} class "
                "indices from 0 on"
            )
        names = getattr(dataset, "classes", None) or range(int(labels.max()) + 1)
        classes = number_repeated([to_text(str(name)) for name in names])
        if labels.max() >= len(classes):
            raise ValueError(f"{title} has {len(classes)} class names, but there is a label {labels.max()}")
        super().__init__(classes, labels.astype(np.int64))
        self.dataset, self.title = dataset, title

    def name(self, i: int) -> str:
        """Return the dataset's name and the position of image i."""
        return f"{self.title}[{i}]"

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return image i, uint8 [H, W, 3]. Raises UnreadableImage if the dataset raises OSError or ValueError."""
        try:
            element = self.dataset[i]
            return to_pixels(element[0] if isinstance(element, tuple | list) else element)
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error


class ReferredDataset(DatasetSource):
    """The dataset that `file.py:attribute` names. Worker processes import the file again, and pickle nothing."""

    def __init__(self, reference: str) -> None:
        """Import the attribute: a dataset, or a function without arguments that returns one.

        Raises:
            ValueError: There is no such file or attribute, or it is no dataset.
        """
        found = resolve(reference)
        is_dataset = hasattr(found, "__getitem__") and not isinstance(found, type)
        super().__init__(found() if callable(found) and not is_dataset else found, reference.rsplit("/", 1)[-1])
        self.reference = reference

    def __reduce__(self) -> Any:
        return ReferredDataset, (self.reference,)


def to_pixels(image: Any) -> NDArray[np.uint8]:
    """Return the pixels of an image, uint8 [H, W, 3] RGB, contiguous and writable.

    Args:
        image: A Pillow image; an array, uint8 [H, W], [H, W, 1] or [H, W, 3]; or a tensor, uint8 [1, H, W] or
            [3, H, W] as torchvision reads it.

    Raises:
        ValueError: It is something else, such as a float tensor: augmentation starts from stored pixels.
    """
    if isinstance(image, torch.Tensor):
        pixels = image.numpy(force=True)
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    elif hasattr(image, "convert"):
        pixels = np.asarray(image.convert("RGB"))
    else:
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"an image is {type(image).__name__} of {pixels.dtype}, shape {list(pixels.shape)}: need a Pillow image, "
            "an array uint8 [H, W, 3] or a tensor uint8 [3, H, W], without normalisation"
        )
    # Pillow's arrays cannot be written to, and torch warns of such.
    return np.require(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), requirements=["C", "W"])
