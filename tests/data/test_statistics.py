"""Our augmentation has the same distributions as torchvision's transforms on the same photographs.

Both sides are reduced to numbers per view (crop area and aspect, and mean brightness, hue, blur energy of the
pictures), whose samples the two-sample test of Kolmogorov and Smirnov compares. Each test can fail: see the last one.
"""

import math
import random

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torchvision import transforms

from data.cpu import render
from data.views import Augment, View, crop_boxes, draw
from tests.data.photos import cuts

N = 2000
LEVEL = 1e-3  # of each test; with fixed seeds it fails always or never
SIZE = 48
NOTHING = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0}


def differ(ours: NDArray, theirs: NDArray) -> float:
    """Return the p-value; below LEVEL, the two distributions differ."""
    return float(ks_2samp(ours, theirs).pvalue)


@pytest.fixture(scope="module")
def pictures() -> list[NDArray[np.uint8]]:
    return cuts(20, seed=7)


def ours(pictures: list[NDArray[np.uint8]], augment: Augment, count: int = N, size: int = SIZE) -> list[NDArray]:
    """Return views of the images in turn, made by the CPU backend."""
    params = draw(5, 0, np.arange(count), 0, View(size=size), augment)
    return [render(pictures[i % len(pictures)], params, i, size) for i in range(count)]


def theirs(pictures: list[NDArray[np.uint8]], transform: transforms.Compose, count: int = N) -> list[NDArray]:
    """Return as many views made by torchvision from PIL images."""
    torch.manual_seed(0)
    random.seed(0)
    images = [Image.fromarray(picture) for picture in pictures]
    return [np.asarray(transform(images[i % len(images)])) for i in range(count)]


def crop(size: int = SIZE) -> transforms.RandomResizedCrop:
    return transforms.RandomResizedCrop(size, scale=(0.2, 1.0))


def brightness(views: list[NDArray]) -> NDArray[np.floating]:
    return np.array([view.mean() for view in views])


def hue(views: list[NDArray]) -> NDArray[np.floating]:
    """Return the angle of the mean chroma in YIQ, in radians."""
    means = np.array([view.mean((0, 1)) for view in views])
    i, q = means @ (0.596, -0.274, -0.322), means @ (0.211, -0.523, 0.312)
    return np.arctan2(q, i)


def blur_energy(views: list[NDArray]) -> NDArray[np.floating]:
    """Measure fine detail: the logarithm of the Laplacian's mean square."""
    return np.array([math.log(1e-3 + (cv2.Laplacian(view, cv2.CV_32F) ** 2).mean()) for view in views])


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (100, 640)])
def test_crop_area_and_aspect(shape: tuple[int, int]) -> None:
    height, width = shape
    params = draw(5, 0, np.arange(N), 0, View(size=SIZE), Augment())
    boxes = crop_boxes(params, np.full(N, height), np.full(N, width))
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    drawn = [transforms.RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(N)]
    other = np.array(drawn)
    for name, number in {
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0] / height,
        "left": lambda b: b[:, 1] / width,
    }.items():
        assert differ(number(boxes), number(other)) > LEVEL, name


def test_brightness_of_the_crop(pictures: list[NDArray[np.uint8]]) -> None:
    a = brightness(ours(pictures, Augment(**NOTHING)))
    b = brightness(theirs(pictures, transforms.Compose([crop()])))
    assert differ(a, b) > LEVEL


def test_jitter(pictures: list[NDArray[np.uint8]]) -> None:
    """Compare brightness and its spread, with the recipes' distributions of brightness and contrast."""
    settings = NOTHING | {"jitter": 0.8, "saturation": 0.0, "hue": 0.0}
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0, 0)], p=0.8)
    a, b = ours(pictures, Augment(**settings)), theirs(pictures, transforms.Compose([crop(), jitter]))
    assert differ(brightness(a), brightness(b)) > LEVEL
    assert differ(*(np.array([view.std() for view in views]) for views in (a, b))) > LEVEL


def test_saturation(pictures: list[NDArray[np.uint8]]) -> None:
    settings = NOTHING | {"jitter": 0.8, "brightness": 0.0, "contrast": 0.0, "hue": 0.0, "gray": 0.2}
    jitter = transforms.RandomApply([transforms.ColorJitter(0, 0, 0.4, 0)], p=0.8)
    a = ours(pictures, Augment(**settings))
    b = theirs(pictures, transforms.Compose([crop(), jitter, transforms.RandomGrayscale(0.2)]))

    def chroma(views: list[NDArray]) -> NDArray[np.floating]:
        return np.array([np.ptp(view.astype(np.float32), axis=2).mean() for view in views])

    assert differ(chroma(a), chroma(b)) > LEVEL
    gray = [np.mean([np.ptp(view, axis=2).max() == 0 for view in views]) for views in (a, b)]
    assert abs(gray[0] - gray[1]) < 4 * math.sqrt(2 * 0.16 / N)


def test_factors_have_the_same_distribution() -> None:
    params = draw(5, 0, np.arange(N), 0, View(size=SIZE), Augment(jitter=1))
    torch.manual_seed(0)
    drawn = [transforms.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)) for _ in range(N)]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        unit = 2 * math.pi if name == "hue" else 1
        assert differ(getattr(params, name) / unit, np.array([factors[i] for factors in drawn])) > LEVEL, name


def test_hue(pictures: list[NDArray[np.uint8]]) -> None:
    """Compare how far hues are rotated, and the resulting hues."""
    settings = NOTHING | {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    count = 800
    plain, turned = (ours(pictures, Augment(**x), count) for x in (NOTHING, settings))
    jitter = transforms.ColorJitter(0, 0, 0, 0.1)
    torch.manual_seed(0)
    other = [np.asarray(jitter(Image.fromarray(view))) for view in plain]
    before = hue(plain)
    angles = [(hue(views) - before + np.pi) % (2 * np.pi) - np.pi for views in (turned, other)]
    assert differ(*angles) > LEVEL
    assert differ(hue(turned), hue(other)) > LEVEL
    assert 0.9 < np.std(angles[0]) / np.std(angles[1]) < 1.1


def test_blur_energy(pictures: list[NDArray[np.uint8]]) -> None:
    count, size = 1500, 64
    blur = transforms.GaussianBlur(23, (0.1, 2.0))  # with the fixed window of the recipes
    a = blur_energy(ours(pictures, Augment(**NOTHING | {"blur": 0.5}), count, size))
    b = blur_energy(theirs(pictures, transforms.Compose([crop(size), transforms.RandomApply([blur], p=0.5)]), count))
    assert differ(a, b) > LEVEL

    def pil(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    # PIL's filter, which MoCo v2 and AdCo use, is a sequence of box filters. It blurs about as strongly.
    c = blur_energy(theirs(pictures, transforms.Compose([crop(size), transforms.RandomApply([pil], p=0.5)]), count))
    assert abs(np.median(a) - np.median(c)) < 0.15


def test_other_distributions_are_detected(pictures: list[NDArray[np.uint8]]) -> None:
    count = 1500
    off = {"saturation": 0.0, "hue": 0.0}
    strong, weak = (Augment(**NOTHING | off | {"jitter": 1.0, "brightness": x, "contrast": x}) for x in (0.4, 0.3))
    spread = [np.array([v.std() for v in ours(pictures, augment, count)]) for augment in (strong, weak)]
    assert differ(*spread) < 0.05
    often, seldom = (blur_energy(ours(pictures, Augment(**NOTHING | {"blur": p}), count)) for p in (0.6, 0.5))
    assert differ(often, seldom) < 0.05
    params = [draw(5, 0, np.arange(N), 0, View(size=SIZE, scale=(low, 1.0)), Augment()) for low in (0.2, 0.25)]
    boxes = [crop_boxes(p, np.full(N, 375), np.full(N, 500)) for p in params]
    assert differ(*(b[:, 2] * b[:, 3] for b in boxes)) < LEVEL
