"""The plain CPU backend: applies `ViewParams` to one picture at a time.

A view is: crop, resize, flip, colour matrix, Gaussian blur, solarize. What defines the picture, for other backends
to agree with (docs/data-backends.md says how far DALI's are):

- resize: bilinear between pixel centres, with a triangle filter as wide as the shrinking along each axis
  (antialiasing; what Pillow, torchvision and DALI call linear with antialias). It reads only the crop.
- colour: `views.color_matrix` about the mean of the resized crop, rounded and clamped once.
- blur: window 2 ceil(3 sigma) + 1 (DALI's rule; torchvision's recipes fix 23), border reflected about the edge pixel.
- solarize: values from 128 on are inverted.
"""

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data.views import ViewParams, color_matrix, crop_box

Image = NDArray[np.uint8]

# Parallelism is over samples, in worker processes; OpenCV's own threads would only fight them.
cv2.setNumThreads(0)


def resize(image: Image, height: int, width: int) -> Image:
    """`image` (uint8 [H, W, 3]) as [height, width, 3], bilinear, antialiased where it shrinks."""
    if image.shape[0] <= height and image.shape[1] <= width:
        # Nothing shrinks, nothing to antialias; a torch call alone costs more than this on a small picture.
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # OpenCV does not antialias linear, and its area filter is three times slower than this one at 224 px.
    # The new axis goes in front before the permutation: only then does torch see channels-last strides, answer in
    # them, and so give OpenCV an array that it need not copy before each of its operations.
    batch = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    shrunk = torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return shrunk.permute(0, 2, 3, 1)[0].numpy()


def render(image: Image, params: ViewParams, i: int, size: int) -> Image:
    """View i of `params` of `image` (uint8 [H, W, 3] RGB): uint8 [size, size, 3]."""
    y, x, h, w = crop_box(params, i, image.shape[0], image.shape[1])
    view = resize(image[y : y + h, x : x + w], size, size)
    if params.flip[i]:
        view = cv2.flip(view, 1)
    if params.recolored[i]:
        view = cv2.transform(view, color_matrix(params, i, cv2.mean(view)))
    sigma = float(params.sigma[i])
    if sigma > 0:
        window = 2 * math.ceil(3 * sigma) + 1
        view = cv2.GaussianBlur(view, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
    if params.solarize[i]:
        view = cv2.min(view, cv2.bitwise_not(view))  # v < 128 is below 255 - v, v >= 128 above
    return view


def render_center(image: Image, size: int) -> Image:
    """The view of `image` (uint8 [H, W, 3]) that evaluation uses: uint8 [size, size, 3].

    The shorter side to size * 256 / 224, then the central square, as torchvision cuts it. A picture whose shorter
    side is not above `size` is taken to come from a data set of small pictures: that side becomes `size`, so that
    nothing of a square one is cut off.
    """
    height, width = image.shape[:2]
    shorter = size if min(height, width) <= size else round(size * 256 / 224)
    image = resize(image, height * shorter // min(height, width), width * shorter // min(height, width))
    y, x = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[y : y + size, x : x + size]
