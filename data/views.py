"""The random parameters of each view of each image: drawn here, applied by a backend (`data.cpu`, `data.dali`).

`draw` is a pure function of (seed, epoch, sample, view), so every backend, rank and worker sees the same parameters,
and a resumed run repeats them.

Colour
------
Brightness, contrast and saturation are linear, with Y the luma of a pixel:

    brightness b   rgb -> b rgb
    contrast c     rgb -> c rgb + (1 - c) mean(Y)       mean(Y): of the view at that point
    saturation s   rgb -> s rgb + (1 - s) Y

These maps commute, so the order of operations, which torchvision draws at random, does not matter and is not drawn.
Together they are one 3x4 matrix per view (`color_matrix`), rounded and clamped to 0..255 once. Hue then turns
each pixel in HSV, as in torchvision, which keeps the channels' minimum and maximum. Grayscale comes last and takes Y.

torchvision's ColorJitter rounds down after brightness, contrast and saturation, which makes the view darker by half a
grey level each; the matrix subtracts as much. Two differences remain. torchvision clamps after each operation, so its
order matters for bright images, and it rounds the mean for contrast to whole grey levels. docs/data-backends.md has the
distances.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_serializer, field_validator

from data.random import VIEWS, uniform

ATTEMPTS = 10  # crops tried before the central one, as in torchvision's RandomResizedCrop

LUMA = np.array([0.299, 0.587, 0.114])
LUMA_RED, LUMA_GREEN, LUMA_BLUE = LUMA.tolist()
# Rounding x - TRUNCATION is rounding x down, also for whole numbers.
TRUNCATION = 0.499

Range = tuple[float, float]


def _check_range(value: Range, name: str | None) -> Range:
    low, high = value
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} is {value}; it must be (low, high) with 0 < low <= high")
    return value


class Augment(BaseModel):
    """Distribution of the augmentations; the default is MoCo v2's, which AdCo uses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: Range = Field((3 / 4, 4 / 3), description="Smallest and largest width / height of the random crop.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    jitter: float = Field(
        0.8, ge=0, le=1, description="Probability of a change of brightness, contrast, saturation and hue."
    )
    brightness: float = Field(
        0.4,
        ge=0,
        allow_inf_nan=False,
        description="Strength x of brightness: the factor is uniform between max(0, 1 - x) and 1 + x.",
    )
    contrast: float = Field(
        0.4,
        ge=0,
        allow_inf_nan=False,
        description="Strength x of contrast: the factor is uniform between max(0, 1 - x) and 1 + x.",
    )
    saturation: float = Field(
        0.4,
        ge=0,
        allow_inf_nan=False,
        description="Strength x of saturation: the factor is uniform between max(0, 1 - x) and 1 + x.",
    )
    hue: float = Field(
        0.1, ge=0, le=0.5, description="Strength x of hue: the rotation is uniform between -x and x turns."
    )
    gray: float = Field(0.2, ge=0, le=1, description="Probability of grayscale.")
    blur: float = Field(0.5, ge=0, le=1, description="Probability of a Gaussian blur.")
    blur_sigma: Range = Field(
        (0.1, 2.0), description="Smallest and largest standard deviation of the blur, in pixels of the view."
    )
    solarize: float = Field(
        0.0, ge=0, le=1, description="Probability of solarization, which inverts values from 128 on."
    )

    @field_validator("ratio", "blur_sigma")
    @classmethod
    def _positive_range(cls, value: Range, info: ValidationInfo) -> Range:
        return _check_range(value, info.field_name)


class View(BaseModel):
    """A view of an image: its size, the area of its random crop, and augmentations of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=8, description="Height and width of the view in pixels.")
    scale: Range = Field(
        (0.2, 1.0), description="Smallest and largest area of the random crop, as shares of the image's area."
    )
    augment: Augment = Field(
        Augment(), description="Augmentations of this view only; keys that are not given are those of data.augment."
    )

    @field_validator("scale")
    @classmethod
    def _scale(cls, value: Range) -> Range:
        if value[1] > 1:
            raise ValueError(f"scale is {value}; a crop cannot be larger than the image (1.0)")
        return _check_range(value, "scale")

    @field_serializer("augment")
    def _given_augment(self, augment: Augment) -> dict[str, Any]:
        return augment.model_dump(mode="json", exclude_unset=True)

    def own_augment(self, common: Augment) -> Augment:
        """Return the distribution of this view's augmentations: `common`, except for the keys that the view gives."""
        own = {name: getattr(self.augment, name) for name in self.augment.model_fields_set}
        return common.model_copy(update=own)


@dataclass(frozen=True)
class ViewParams:
    """Parameters of one view of B images, one array each.

    Without jitter, brightness, contrast and saturation are 1 and hue is 0.
    """

    crop_height: NDArray[np.float64]  # [B, 10] attempts, in units of sqrt(image height x width)
    crop_width: NDArray[np.float64]  # [B, 10] likewise
    crop_position: NDArray[np.float64]  # [B, 2] (y, x) in [0, 1), over all positions where the crop fits
    ratio: Range  # allowed width / height of the central crop
    flip: NDArray[np.bool_]  # [B]
    brightness: NDArray[np.float64]  # [B] factor
    contrast: NDArray[np.float64]  # [B] factor
    saturation: NDArray[np.float64]  # [B] factor
    hue: NDArray[np.float64]  # [B] angle in radians
    gray: NDArray[np.bool_]  # [B]
    sigma: NDArray[np.float64]  # [B] pixels of the view; 0: no blur
    solarize: NDArray[np.bool_]  # [B]

    def __len__(self) -> int:
        return len(self.flip)

    @cached_property
    def recolored(self) -> NDArray[np.bool_]:
        """Bool [B]: true where the colour matrix differs from the identity."""
        return (self.brightness != 1) | (self.contrast != 1) | (self.saturation != 1)

    @cached_property
    def color_linear(self) -> NDArray[np.float64]:
        """The part of the colour matrix that does not depend on the image: [B, 3, 3]."""
        saturation = self.saturation[:, None, None]
        gain = (self.brightness * self.contrast)[:, None, None]
        return gain * (saturation * np.eye(3) + (1 - saturation) * LUMA)

    @cached_property
    def color_offset(self) -> NDArray[np.float64]:
        """The share of the view's mean luma that the colour matrix adds to each channel: [B]."""
        return self.brightness * (1 - self.contrast)

    @cached_property
    def color_shift(self) -> NDArray[np.float64]:
        """The grey levels that the colour matrix adds to each channel, because torchvision rounds down: [B]."""
        return -TRUNCATION * sum(
            (factor != 1).astype(int) for factor in (self.brightness, self.contrast, self.saturation)
        )


def _between(u: NDArray[np.float64], bounds: Range) -> NDArray[np.float64]:
    low, high = bounds
    return low + (high - low) * u


def draw(
    seed: int, epoch: int, samples: NDArray[np.int64], view_index: int, view: View, augment: Augment
) -> ViewParams:
    """Draw the parameters of one view of a batch.

    Args:
        seed: Seed of the run.
        epoch: The epoch.
        samples: Indices of the images, int64 [B].
        view_index: Position of the view among the views of an image.
        view: Size and crop of the view.
        augment: Distribution of the augmentations.
    """
    u = uniform(seed, VIEWS, epoch, samples, view_index, draws=2 * ATTEMPTS + 12)
    side = np.sqrt(_between(u[:, :ATTEMPTS], view.scale))
    log_ratio = _between(u[:, ATTEMPTS : 2 * ATTEMPTS], (math.log(augment.ratio[0]), math.log(augment.ratio[1])))
    root_ratio = np.exp(log_ratio / 2)
    # Each parameter has its own column, so switching off one augmentation does not change the others.
    y, x, flip, jitter, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = u[:, 2 * ATTEMPTS :].T
    jittered = jitter < augment.jitter

    def factor(u: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
        return np.where(jittered, _between(u, (max(0.0, 1 - strength), 1 + strength)), 1.0)

    turn = 2 * math.pi * augment.hue
    return ViewParams(
        crop_height=side / root_ratio,
        crop_width=side * root_ratio,
        crop_position=np.stack([y, x], axis=1),
        ratio=augment.ratio,
        flip=flip < augment.flip,
        brightness=factor(brightness, augment.brightness),
        contrast=factor(contrast, augment.contrast),
        saturation=factor(saturation, augment.saturation),
        hue=np.where(jittered, _between(hue, (-turn, turn)), 0.0),
        gray=gray < augment.gray,
        sigma=np.where(blur < augment.blur, _between(sigma, augment.blur_sigma), 0.0),
        solarize=solarize < augment.solarize,
    )


def crop_box(params: ViewParams, i: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the crop of view i from an image of `height` x `width` as (y, x, h, w) in pixels, inside the image.

    The first attempt that fits is taken; if none fits, the largest central crop with an allowed ratio, as in
    torchvision's RandomResizedCrop. Plain Python is ten times faster than numpy for a single image.
    """
    root_area = math.sqrt(height * width)
    for side_y, side_x in zip(params.crop_height[i].tolist(), params.crop_width[i].tolist(), strict=True):
        h, w = round(root_area * side_y), round(root_area * side_x)
        if 0 < h <= height and 0 < w <= width:
            v, u = params.crop_position[i].tolist()
            return int(v * (height - h + 1)), int(u * (width - w + 1)), h, w
    low, high = params.ratio
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_boxes(params: ViewParams, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `crop_box` of each of B images, int64 [B, 4] of (y, x, h, w)."""
    sizes = zip(heights.tolist(), widths.tolist(), strict=True)
    return np.array([crop_box(params, i, h, w) for i, (h, w) in enumerate(sizes)], np.int64).reshape(-1, 4)


def color_matrix(params: ViewParams, i: int, mean_rgb: tuple[float, ...] | NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the change of view i's brightness, contrast and saturation.

    Args:
        params: Parameters of the views of a batch.
        i: Position of the view in `params`.
        mean_rgb: Mean colour of the crop before the change, which contrast keeps.

    Returns:
        float32 [3, 4] `m`, such that `m[:, :3] @ rgb + m[:, 3]` is the new colour, with channels in 0..255.
    """
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = params.color_linear[i]
    red, green, blue = mean_rgb[:3]
    mean_luma = LUMA_RED * red + LUMA_GREEN * green + LUMA_BLUE * blue
    matrix[:, 3] = params.color_offset[i] * mean_luma + params.color_shift[i]
    return matrix
