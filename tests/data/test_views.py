import colorsys
from collections.abc import Iterator
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

from data.cpu import render, rotate_hue
from data.random import VIEWS, uniform
from data.views import Augment, View, ViewParams, color_matrix, crop_box, crop_boxes, draw
from tests.data.images import photograph

N = 20_000
SIGMAS = 4  # statistical tests allow this many standard errors

FIELDS = [
    "crop_height", "crop_width", "crop_position", "flip", "brightness", "contrast", "saturation", "hue", "gray",
    "sigma", "solarize",
]  # fmt: skip


@pytest.fixture(scope="module")
def params() -> ViewParams:
    """MoCo v2's augmentation of many samples."""
    return draw(1, 0, np.arange(N), 0, View(size=224), Augment(solarize=0.2))


def moved(**changes: float) -> ViewParams:
    """Return parameters of one view with `changes` only: a crop of the complete image, no colour change."""
    values = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0} | changes

    def array(name: str) -> NDArray[np.float64]:
        return np.array([values.get(name, 0)], np.float64)

    nowhere = np.full((1, 10), 99.0)  # no attempt fits, and a wide ratio makes the central crop the complete image
    return ViewParams(
        crop_height=nowhere,
        crop_width=nowhere,
        crop_position=np.zeros((1, 2)),
        ratio=(1e-3, 1e3),
        flip=array("flip") > 0,
        brightness=array("brightness"),
        contrast=array("contrast"),
        saturation=array("saturation"),
        hue=array("hue"),
        gray=array("gray") > 0,
        sigma=array("sigma"),
        solarize=array("solarize") > 0,
    )


def test_golden() -> None:
    # A change of these values would silently change every resumed run.
    p = draw(3, 2, np.array([0, 41]), 1, View(size=224), Augment(solarize=0.3))
    pinned: dict[str, Any] = {
        "crop_position": [[0.26294153636066975, 0.04855506294399614], [0.024061938582190412, 0.023704372554721576]],
        "flip": [True, True],
        "brightness": [0.9622645902048208, 1.2459113118141625],
        "contrast": [1.1817559579425523, 1.0503103321251785],
        "saturation": [1.2382034555927035, 1.0597875892991206],
        "hue": [0.14295748780433137, 0.1960814144724634],
        "gray": [True, False],
        "sigma": [0.0, 0.9455174865765487],
        "solarize": [False, True],
    }
    for name, value in pinned.items():
        np.testing.assert_allclose(getattr(p, name), value, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(p.crop_height[:, 0], [0.9057118498182569, 0.44365184958342996], rtol=1e-12)
    np.testing.assert_allclose(p.crop_width[:, 9], [0.8133952054227673, 0.5381490941622914], rtol=1e-12)
    boxes = crop_boxes(p, np.array([375, 64]), np.array([500, 2000]))
    assert boxes.tolist() == [[11, 11, 334, 256], [0, 957, 64, 85]]


def test_draw_is_a_function_of_each_sample(params: ViewParams) -> None:
    some = np.array([17, 3, 17, 19_999])
    again = draw(1, 0, some, 0, View(size=224), Augment(solarize=0.2))
    for name in FIELDS:
        assert (getattr(again, name) == getattr(params, name)[some]).all(), name
    assert len(again) == 4


@pytest.mark.parametrize(("seed", "epoch", "view"), [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_seeds_epochs_and_views_are_independent(params: ViewParams, seed: int, epoch: int, view: int) -> None:
    other = draw(seed, epoch, np.arange(N), view, View(size=224), Augment(solarize=0.2))
    for name in FIELDS:
        a, b = (np.asarray(getattr(p, name), np.float64).reshape(N, -1)[:, 0] for p in (params, other))
        assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / np.sqrt(N), name


def test_probabilities(params: ViewParams) -> None:
    jittered = params.hue != 0
    for name, applied, p in [
        ("flip", params.flip, 0.5),
        ("jitter", jittered, 0.8),
        ("gray", params.gray, 0.2),
        ("blur", params.sigma > 0, 0.5),
        ("solarize", params.solarize, 0.2),
    ]:
        assert abs(applied.mean() - p) < SIGMAS * np.sqrt(p * (1 - p) / N), name
    # Brightness, contrast, saturation and hue are changed together or not at all.
    for factor in (params.brightness, params.contrast, params.saturation):
        assert ((factor != 1) == jittered).all()
    assert (params.recolored == jittered).all()


def test_ranges(params: ViewParams) -> None:
    jittered = params.hue != 0
    area = params.crop_height * params.crop_width
    log_ratio = np.log(params.crop_width / params.crop_height)
    for name, values, low, high in [
        ("brightness", params.brightness[jittered], 0.6, 1.4),
        ("contrast", params.contrast[jittered], 0.6, 1.4),
        ("saturation", params.saturation[jittered], 0.6, 1.4),
        ("hue", params.hue[jittered], -0.2 * np.pi, 0.2 * np.pi),
        ("sigma", params.sigma[params.sigma > 0], 0.1, 2.0),
        ("area", area.ravel(), 0.2, 1.0),
        ("log ratio", log_ratio.ravel(), np.log(3 / 4), np.log(4 / 3)),
        ("crop position", params.crop_position.ravel(), 0, 1),
    ]:
        tolerance = 1e-9
        assert values.min() >= low - tolerance, name
        assert values.max() <= high + tolerance, name
        # Uniform: a tenth of the values in each tenth of the range.
        shares = np.histogram(values, 10, (low - tolerance, high + tolerance))[0] / len(values)
        assert np.abs(shares - 0.1).max() < SIGMAS * np.sqrt(0.09 / len(values)), name


def test_parameters_of_a_view_are_uncorrelated(params: ViewParams) -> None:
    chosen = (params.hue != 0) & (params.sigma > 0)  # where they are not constants
    columns = [np.asarray(getattr(params, name), np.float64).reshape(N, -1)[chosen, :2].T for name in FIELDS]
    correlation = np.asarray(np.corrcoef(np.concatenate(columns)))
    height, width = 0, 2  # of the first two attempts each; those of one attempt share an area
    for attempt in (0, 1):
        correlation[height + attempt, width + attempt] = correlation[width + attempt, height + attempt] = 0
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(chosen.sum())  # of 105 pairs


def test_applied_operations_are_independent(params: ViewParams) -> None:
    applied = np.stack([params.flip, params.hue != 0, params.gray, params.sigma > 0, params.solarize])
    correlation = np.asarray(np.corrcoef(applied))
    assert np.abs(correlation - np.eye(5)).max() < SIGMAS / np.sqrt(N)


@pytest.mark.parametrize(
    ("off", "touched"),
    [
        ({"flip": 0}, {"flip"}),
        ({"jitter": 0}, {"brightness", "contrast", "saturation", "hue"}),
        ({"brightness": 0}, {"brightness"}),
        ({"contrast": 0}, {"contrast"}),
        ({"saturation": 0}, {"saturation"}),
        ({"hue": 0}, {"hue"}),
        ({"gray": 0}, {"gray"}),
        ({"blur": 0}, {"sigma"}),
        ({"solarize": 0}, {"solarize"}),
    ],
)
def test_switching_one_off_does_not_change_the_others(
    params: ViewParams, off: dict[str, float], touched: set[str]
) -> None:
    other = draw(1, 0, np.arange(500), 0, View(size=224), Augment(**{"solarize": 0.2} | off))
    for name in FIELDS:
        value = getattr(other, name)
        if name in touched:
            neutral = 1 if name in ("brightness", "contrast", "saturation") else 0
            assert (value == neutral).all(), name
        else:
            assert (value == getattr(params, name)[:500]).all(), name


def test_a_view_replaces_the_keys_that_it_gives() -> None:
    common = Augment(blur=0.3, gray=0, ratio=(1, 1))
    assert View(size=32).own_augment(common) == common
    view = View(size=32, augment=Augment(blur=0.5, solarize=0.2))  # 0.5 is also the default
    own = view.own_augment(common)
    assert own == Augment(blur=0.5, gray=0, ratio=(1, 1), solarize=0.2)
    assert View.model_validate(view.model_dump(mode="json")).own_augment(common) == own


def test_strong_jitter_does_not_go_below_zero() -> None:
    p = draw(0, 0, np.arange(2000), 0, View(size=32), Augment(brightness=1.5, jitter=1))
    assert 0 <= p.brightness.min() < 0.01
    assert 2.49 < p.brightness.max() <= 2.5


def test_multi_crop() -> None:
    large, small = View(size=224, scale=(0.14, 1.0)), View(size=96, scale=(0.05, 0.14))
    samples = np.arange(2000)
    heights, widths = np.full(2000, 400), np.full(2000, 500)
    for index, view in enumerate([large, large, small, small]):
        p = draw(0, 0, samples, index, view, Augment())
        boxes = crop_boxes(p, heights, widths)
        share = boxes[:, 2] * boxes[:, 3] / (400 * 500)
        assert view.scale[0] - 0.01 < share.min() < view.scale[0] + 0.02
        assert view.scale[1] - 0.1 < share.max() < view.scale[1] + 0.01
        # The settings of a view change its crop only.
        other = draw(0, 0, samples, index, small if view is large else large, Augment())
        assert (p.hue == other.hue).all()
        assert (p.crop_position == other.crop_position).all()
        assert (p.crop_height != other.crop_height).all()


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (28, 28), (1, 1), (1, 50), (7, 3), (10, 1000), (1000, 10)])
def test_crops_lie_inside(size: tuple[int, int]) -> None:
    height, width = size
    p = draw(0, 0, np.arange(2000), 0, View(size=224), Augment())
    boxes = crop_boxes(p, np.full(2000, height), np.full(2000, width))
    y, x, h, w = boxes.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (y + h <= height).all()
    assert (x + w <= width).all()
    assert boxes.shape == (2000, 4)
    assert boxes.dtype == np.int64
    assert boxes[7].tolist() == list(crop_box(p, 7, height, width))
    if size == (375, 500):  # both ends are reached
        assert y.min() == 0
        assert (y + h).max() == height
        assert (x + w).max() == width


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (10, 1000), (1000, 10), (100, 140), (80, 200)])
def test_crop_equals_torchvision(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """RandomResizedCrop with our random numbers gives the same box."""
    height, width = size
    count = 300
    u = uniform(4, VIEWS, 1, np.arange(count), 2, draws=22)
    p = draw(4, 1, np.arange(count), 2, View(size=224), Augment())
    attempts: Iterator[float]
    positions: Iterator[float]

    def uniform_(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        # In double precision, because in single precision a side could round to another pixel.
        return torch.tensor([float(low) + (float(high) - float(low)) * next(attempts)], dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(low + int(next(positions) * (high - low)))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    monkeypatch.setattr(torch, "randint", randint)
    picture = torch.empty(3, height, width)
    for i in range(count):
        attempts = iter(np.stack([u[i, :10], u[i, 10:20]], axis=1).ravel().tolist())
        positions = iter(u[i, 20:22].tolist())
        theirs = RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3])
        assert crop_box(p, i, height, width) == theirs, i


def color_steps(picture: NDArray[np.uint8], p: ViewParams, order: tuple[str, ...]) -> NDArray[np.float64]:
    """Apply the linear colour changes of view 0 one after another, as the module's docstring defines them."""
    rgb = picture.astype(np.float64)
    for step in order:
        luma = (rgb @ np.array([0.299, 0.587, 0.114]))[..., None]
        if step == "brightness":
            rgb = p.brightness[0] * rgb
        elif step == "contrast":
            rgb = p.contrast[0] * rgb + (1 - p.contrast[0]) * luma.mean()
        else:
            rgb = p.saturation[0] * rgb + (1 - p.saturation[0]) * luma
    return rgb


@pytest.mark.parametrize("order", list(permutations(["brightness", "contrast", "saturation"])))
def test_color_matrix_equals_the_steps_in_any_order(order: tuple[str, ...]) -> None:
    picture = photograph(40, 50)
    p = moved(brightness=1.3, contrast=0.7, saturation=1.35, hue=0.5, gray=1)
    m = color_matrix(p, 0, picture.mean((0, 1)))
    assert m.dtype == np.float32
    exact = color_steps(picture, p, order) - 3 * 0.499  # torchvision rounds down after each step
    np.testing.assert_allclose(picture @ m[:, :3].T + m[:, 3], exact, atol=1e-3)


def test_color_matrix_without_changes_is_the_identity() -> None:
    p = moved()
    assert not p.recolored[0]
    np.testing.assert_allclose(color_matrix(p, 0, (50, 60, 70)), np.eye(3, 4), atol=1e-6)


def test_gray_has_equal_channels_and_keeps_luma() -> None:
    picture = photograph(40, 50)
    view = render(picture, moved(gray=1, hue=0.3, saturation=1.2), 0, 32)
    assert (view[..., 0] == view[..., 1]).all()
    assert (view[..., 0] == view[..., 2]).all()
    luma = render(picture, moved(hue=0.3, saturation=1.2), 0, 32) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(view[..., 0] - luma).max() <= 0.51


def color_distance(order: tuple[str, ...], factors: dict[str, float]) -> float:
    """Return the mean distance of our colour change from ColorJitter's in one of its orders, in grey levels."""
    picture = photograph(80, 100)
    ours = render(picture, moved(**factors | {"hue": 2 * np.pi * factors.get("hue", 0)}), 0, 64)
    theirs = torch.from_numpy(render(picture, moved(), 0, 64)).permute(2, 0, 1)
    for name in order:
        theirs = getattr(tvf, f"adjust_{name}")(theirs, factors[name])
    return float(np.abs(ours.astype(float) - theirs.permute(1, 2, 0).numpy()).mean())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
def test_one_color_change_equals_torchvision(name: str, factor: float) -> None:
    assert color_distance((name,), {name: factor}) < 1  # torchvision truncates and we round


@pytest.mark.parametrize("hue", [-0.5, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.45])
def test_hue_equals_torchvision(hue: float) -> None:
    assert color_distance(("hue",), {"hue": hue}) < 0.1


@pytest.mark.parametrize("hue", [-3.1, -1.3, -0.3, 0.01, 0.7, 2.5])
def test_hue_is_a_rotation_in_hsv(hue: float) -> None:
    # All kinds of colours: primary, mixed, gray, black and white, and two or three equal channels.
    colors = [*product((0, 1, 128, 254, 255), repeat=3), *product((10, 90, 91), repeat=3)]
    picture = np.array(colors, np.uint8)[None]
    exact = []
    for r, g, b in colors:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        exact.append(colorsys.hsv_to_rgb((h + hue / (2 * np.pi)) % 1, s, v))
    assert np.abs(rotate_hue(picture, hue)[0] - np.array(exact)).max() < 0.51


def test_hue_rotates_in_the_direction_of_hsv() -> None:
    red = np.full((8, 8, 3), (200, 40, 40), np.uint8)
    r, g, b = render(red, moved(hue=0.5), 0, 8)[0, 0].tolist()
    assert r > g > b  # towards yellow
    r, g, b = render(red, moved(hue=-0.5), 0, 8)[0, 0].tolist()
    assert r > b > g  # towards magenta


@pytest.mark.parametrize(("hue", "bound"), [(0, 2), (0.07, 2), (-0.07, 2)])
def test_combined_color_changes_are_close_to_torchvision(hue: float, bound: float) -> None:
    factors = {"brightness": 1.2, "contrast": 0.8, "saturation": 1.3, "hue": hue}
    distances = [color_distance(order, factors) for order in permutations(factors)]
    assert len(distances) == 24
    assert max(distances) < bound


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (View, {"size": 4}, "greater than or equal to 8"),
        (View, {"size": 32, "scale": (0, 1)}, "scale is"),
        (View, {"size": 32, "scale": (0.5, 0.2)}, "scale is"),
        (View, {"size": 32, "scale": (0.5, 1.2)}, "larger than the image"),
        (View, {"size": 32, "crop": 1}, "Extra inputs"),
        (Augment, {"flip": 1.1}, "less than or equal to 1"),
        (Augment, {"hue": 0.6}, "less than or equal to 0.5"),
        (Augment, {"brightness": -0.1}, "greater than or equal to 0"),
        (Augment, {"brightness": float("nan")}, "brightness"),
        (Augment, {"blur_sigma": (0, 2)}, "blur_sigma is"),
        (Augment, {"ratio": (1, float("inf"))}, "ratio is"),
    ],
)
def test_wrong_settings_are_refused(model: type[BaseModel], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**settings)
