"""The plain CPU backend: applies `ViewParams` to one image at a time.

A view is: crop, resize, flip, colour matrix, hue, grayscale, Gaussian blur, solarize. This definition of the pixels
holds for all backends; docs/data-backends.md has DALI's distance from it.

- resize: bilinear between pixel centres, with a triangle filter whose width is the reduction along each axis
  (antialiasing; Pillow, torchvision and DALI call this linear with antialias). Only pixels of the crop are used.
- colour: `views.color_matrix` about the mean of the resized crop, rounded and clamped once.
- hue: a rotation in HSV, computed in fp32 and rounded.
- blur: window 2 ceil(3 sigma) + 1 (DALI's rule; torchvision's recipes use a fixed 23), border reflected about the edge
  pixel.
- solarize: values from 128 on are inverted.
"""

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data.views import ViewParams, color_matrix, crop_box

Image = NDArray[np.uint8]

MAX_ASPECT = 32  # of images that `render_center` resizes as a whole

# Worker processes work in parallel on different images, and OpenCV's own threads would compete with them.
cv2.setNumThreads(0)


def resize(image: Image, height: int, width: int) -> Image:
    """Resize uint8 [H, W, 3] to uint8 [height, width, 3], bilinear, with antialiasing where it shrinks."""
    if image.shape[0] <= height and image.shape[1] <= width:
        # Without shrinking there is nothing to antialias, and a torch call alone costs more than this for small images.
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # OpenCV's linear filter does not antialias, and its area filter is three times slower than torch's at 224 pixels.
    # The batch axis is added before the permutation. Only then torch sees channels-last strides and returns an array
    # with the same strides, which OpenCV need not copy before each operation.
    batch = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    shrunk = torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return shrunk.permute(0, 2, 3, 1)[0].numpy()


def rotate_hue(image: Image, angle: float) -> Image:
    """Turn the hue of uint8 [H, W, 3] RGB by an angle in radians, from red towards yellow, as in HSV."""
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] += math.degrees(angle) % 360  # OpenCV takes hues up to 720 degrees, but no negative ones
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def render(image: Image, params: ViewParams, i: int, size: int) -> Image:
    """Make a view of an image.

    Args:
        image: uint8 [H, W, 3] RGB.
        params: Parameters of the views of a batch.
        i: Position of the view in `params`.
        size: Height and width of the view.

    Returns:
        uint8 [size, size, 3].
    """
    y, x, h, w = crop_box(params, i, image.shape[0], image.shape[1])
    view = resize(image[y : y + h, x : x + w], size, size)
    if params.flip[i]:
        view = cv2.flip(view, 1)
    if params.recolored[i]:
        view = cv2.transform(view, color_matrix(params, i, cv2.mean(view)))
    if params.hue[i]:
        view = rotate_hue(view, float(params.hue[i]))
    if params.gray[i]:
        view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    sigma = float(params.sigma[i])
    if sigma > 0:
        window = 2 * math.ceil(3 * sigma) + 1
        view = cv2.GaussianBlur(view, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
    if params.solarize[i]:
        view = cv2.min(view, cv2.bitwise_not(view))  # v < 128 is below 255 - v, v >= 128 above
    return view


def render_center(image: Image, size: int, crop: float | None = None) -> Image:
    """Make the central view for evaluations.

    Args:
        image: uint8 [H, W, 3] RGB.
        size: Height and width of the view.
        crop: Side of the central square as a share of the image's shorter side. None takes 224 / 256, as torchvision's
            recipes, for images whose shorter side is above `size`, and 1 for others, which belong to a data set of
            small images.

    Returns:
        uint8 [size, size, 3].
    """
    # Of a strip only the middle is enlarged: 65,000 x 1 pixels would need 10 GB. The rest is far outside of the view.
    margins = [max(0, (side - MAX_ASPECT * min(image.shape[:2])) // 2) for side in image.shape[:2]]
    image = image[margins[0] : image.shape[0] - margins[0], margins[1] : image.shape[1] - margins[1]]
    height, width, y, x = _center(image.shape[0], image.shape[1], size, crop)
    return resize(image, height, width)[y : y + size, x : x + size]


def center_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], size: int, crop: float | None
) -> NDArray[np.float64]:
    """Return the part of each of B images that `render_center` shows: [B, 4] of (y, x, h, w) in the image's pixels."""
    boxes = []
    for height, width in zip(heights.tolist(), widths.tolist(), strict=True):
        resized_height, resized_width, y, x = _center(height, width, size, crop)
        down, across = height / resized_height, width / resized_width
        boxes.append((y * down, x * across, size * down, size * across))
    return np.array(boxes, np.float64).reshape(-1, 4)


def _center(height: int, width: int, size: int, crop: float | None) -> tuple[int, int, int, int]:
    """Return height and width of the resized image, and the first row and column of its central view."""
    if crop is None:
        crop = 1.0 if min(height, width) <= size else 224 / 256
    shorter = round(size / crop)
    height, width = height * shorter // min(height, width), width * shorter // min(height, width)
    return height, width, round((height - size) / 2), round((width - size) / 2)
