import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as tvf

from data import cpu
from data.cpu import render, render_center, resize
from data.views import TRUNCATION, Augment, View, crop_box, draw
from tests.data.images import photograph
from tests.data.test_views import moved


def detailed(height: int, width: int) -> NDArray[np.uint8]:
    """An image with edges of one pixel, on which a resize without antialiasing fails."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.addWeighted(photograph(height, width), 0.5, noise, 0.5, 0)


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    """Return the largest difference of two images in grey levels."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((375, 500), (224, 224)),
        ((300, 300), (96, 96)),
        ((225, 225), (224, 224)),
        ((50, 70), (224, 224)),  # larger
        ((28, 28), (28, 28)),  # the same
        ((100, 400), (224, 224)),  # one axis larger, the other smaller
        ((1, 1), (8, 8)),
    ],
)
def test_resize_equals_pillow(source: tuple[int, int], target: tuple[int, int]) -> None:
    picture = detailed(*source)
    before = picture.copy()
    ours = resize(picture, *target)
    assert ours.dtype == np.uint8
    pillows = Image.fromarray(picture).resize((target[1], target[0]), Image.Resampling.BILINEAR)
    assert distance(ours, np.asarray(pillows)) <= 1
    theirs = tvf.resize(torch.from_numpy(picture).permute(2, 0, 1), list(target), antialias=True)
    assert distance(ours, theirs.permute(1, 2, 0).numpy()) <= 1
    assert (picture == before).all()


def test_resize_of_a_crop_reads_only_the_crop() -> None:
    picture = detailed(80, 90)
    crop = picture[20:60, 30:80]
    assert (resize(crop, 16, 16) == resize(crop.copy(), 16, 16)).all()
    picture[:20] = picture[60:] = 255
    assert (resize(crop, 16, 16) == resize(crop.copy(), 16, 16)).all()


def test_crop_equals_the_box() -> None:
    picture = detailed(120, 160)
    params = draw(0, 0, np.arange(20), 0, View(size=48), Augment(flip=0, jitter=0, gray=0, blur=0))
    for i in range(20):
        y, x, h, w = crop_box(params, i, 120, 160)
        cropped = Image.fromarray(picture[y : y + h, x : x + w]).resize((48, 48), Image.Resampling.BILINEAR)
        assert distance(render(picture, params, i, 48), np.asarray(cropped)) <= 1


def test_render_without_changes_keeps_the_image_and_never_changes_its_input() -> None:
    picture = detailed(32, 32)
    before = picture.copy()
    assert (render(picture, moved(), 0, 32) == picture).all()
    everything = moved(flip=1, brightness=1.2, contrast=1.2, saturation=1.2, hue=0.3, sigma=1, solarize=1)
    view = render(picture, everything, 0, 32)
    assert (picture == before).all()
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
    view[:] = 0  # the result does not share memory with the image
    assert (picture == before).all()


def test_flip() -> None:
    picture = detailed(32, 32)
    assert (render(picture, moved(flip=1), 0, 32) == picture[:, ::-1]).all()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("size", [8, 64])
def test_blur_equals_torchvision(sigma: float, size: int) -> None:
    picture = detailed(size, size)
    window = 2 * math.ceil(3 * sigma) + 1
    theirs = tvf.gaussian_blur(torch.from_numpy(picture).permute(2, 0, 1), [window, window], [sigma, sigma])
    assert distance(render(picture, moved(sigma=sigma), 0, size), theirs.permute(1, 2, 0).numpy()) <= 1


def test_blur_is_close_to_the_wide_window_of_the_recipes() -> None:
    picture = detailed(64, 64)
    for sigma in (0.1, 1.0, 2.0):
        wide = tvf.gaussian_blur(torch.from_numpy(picture).permute(2, 0, 1), [23, 23], [sigma, sigma])
        assert distance(render(picture, moved(sigma=sigma), 0, 64), wide.permute(1, 2, 0).numpy()) <= 1


def test_blur_wider_than_the_view() -> None:
    view = render(detailed(8, 8), moved(sigma=5), 0, 8)
    assert np.ptp(view.astype(int), axis=(0, 1)).max() < 30


def test_solarize_inverts_from_128_on() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = np.stack([ramp, ramp.T, ramp[::-1]], axis=-1)
    view = render(picture, moved(solarize=1), 0, 16)
    assert (view == np.where(picture < 128, picture, 255 - picture)).all()
    theirs = tvf.solarize(torch.from_numpy(picture).permute(2, 0, 1), 128)
    assert (view == theirs.permute(1, 2, 0).numpy()).all()


def test_solarize_comes_after_color_and_blur() -> None:
    picture = photograph(64, 64)
    changes = {"brightness": 1.4, "sigma": 1.0, "flip": 1}
    plain = render(picture, moved(**changes), 0, 64)
    assert (render(picture, moved(solarize=1, **changes), 0, 64) == np.minimum(plain, 255 - plain)).all()


def test_contrast_keeps_the_mean_of_the_crop() -> None:
    # The left half is dark and the right half bright: without contrast each crop becomes its own mean, not the image's.
    picture = np.full((100, 100, 3), 230, np.uint8)
    picture[:, :50] = 30
    one, none = np.ones(50), np.zeros(50)
    plain = draw(0, 0, np.arange(50), 0, View(size=16, scale=(0.05, 0.1)), Augment(flip=0, jitter=0, gray=0, blur=0))
    flat = replace(plain, brightness=one, contrast=none, saturation=one, hue=none)
    means = [float(render(picture, plain, i, 16).mean()) for i in range(50)]
    assert min(means) == 30
    assert max(means) == 230
    for i, mean in enumerate(means):
        assert np.abs(render(picture, flat, i, 16) - (mean - TRUNCATION)).max() <= 0.51


def test_bright_colors_are_clamped() -> None:
    picture = np.full((8, 8, 3), (250, 200, 10), np.uint8)
    view = render(picture, moved(brightness=1.4), 0, 8)
    assert view[0, 0].tolist() == [255, 255, 14]


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (256, 256), (300, 260), (230, 400)])
def test_render_center_of_photographs_equals_torchvision(size: tuple[int, int]) -> None:
    picture = detailed(*size)
    scaled = tvf.resize(torch.from_numpy(picture).permute(2, 0, 1), 256, antialias=True)
    theirs = tvf.center_crop(scaled, [224, 224]).permute(1, 2, 0).numpy()
    assert distance(render_center(picture, 224), theirs) <= 1


@pytest.mark.parametrize("shape", [(28, 28), (20, 20), (8, 8)])
def test_render_center_keeps_all_of_a_small_image(shape: tuple[int, int]) -> None:
    picture = detailed(*shape)
    assert (render_center(picture, 28) == resize(picture, 28, 28)).all()
    if shape == (28, 28):
        assert (render_center(picture, 28) == picture).all()


@pytest.mark.parametrize("shape", [(1, 60_000), (60_001, 2)])
def test_only_the_middle_of_a_strip_is_enlarged(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    middle = max(shape) // 2
    along = image if shape[0] > shape[1] else image.transpose(1, 0, 2)
    along[middle - 4 : middle + 4] = 200
    sizes = []

    def counted(part: np.ndarray, height: int, width: int) -> np.ndarray:
        sizes.append((height, width))
        return resize(part, height, width)

    monkeypatch.setattr(cpu, "resize", counted)
    assert (render_center(image, 224) == 200).all()
    assert max(sizes[0]) <= 34 * 256


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3000, 20), (33, 1000)])
def test_render_of_odd_shapes(shape: tuple[int, int]) -> None:
    picture = detailed(*shape)
    assert render_center(picture, 32).shape == (32, 32, 3)
    params = draw(0, 0, np.arange(10), 0, View(size=32), Augment())
    for i in range(10):
        assert render(picture, params, i, 32).shape == (32, 32, 3)
