"""Measure how far our colour jitter is from torchvision's on photographs: python docs/bench/color_distance.py FOLDER.

Both change the same views with the same parameters, with AdCo's probabilities: jitter 0.8 of strengths 0.4, 0.4, 0.4
and 0.1, and grayscale 0.2. torchvision's order of brightness, contrast, saturation and hue is drawn; `two orders` is
the distance of torchvision from itself in another order. The distance of two views is the mean absolute difference of
their values, in grey levels; the columns are its mean and quantiles over the views.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional

from data.cpu import render
from data.sources.open import open_source
from data.views import Augment, View, ViewParams, draw

COUNT, SIZE = 400, 224
NAMES = ["brightness", "contrast", "saturation", "hue"]


def torchvision_view(plain: NDArray[np.uint8], params: ViewParams, i: int, names: list[str]) -> NDArray[np.uint8]:
    """Apply the operations in this order with torchvision to a view of PIL."""
    view = Image.fromarray(plain)
    for name in names:
        value = float(getattr(params, name)[i])
        if name == "hue":
            view = functional.adjust_hue(view, value / (2 * np.pi))
        elif value != 1:
            view = getattr(functional, f"adjust_{name}")(view, value)
    return np.asarray(functional.to_grayscale(view, 3) if params.gray[i] else view)


def main() -> None:
    """Print the table."""
    source = open_source(sys.argv[1])
    rng = np.random.default_rng(0)
    samples = rng.permutation(len(source))[:COUNT]
    params = draw(7, 0, samples, 0, View(size=SIZE), Augment(blur=0, flip=0))
    ones, nothing = np.ones(len(samples)), np.zeros(len(samples))
    colorless = replace(params, brightness=ones, contrast=ones, saturation=ones, hue=nothing, gray=nothing > 0)
    only: dict[str, Callable[[], ViewParams]] = {
        name: lambda name=name: replace(colorless, **{name: getattr(params, name)}) for name in NAMES
    }
    distances: dict[str, list[float]] = {name: [] for name in (*NAMES, "all", "two orders")}
    for i, sample in enumerate(samples.tolist()):
        image = source.image(sample)
        plain = render(image, colorless, i, SIZE)

        def add(name: str, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
            distances[name].append(float(np.abs(a.astype(float) - b).mean()))

        for name in NAMES:
            changed = only[name]()
            add(name, render(image, changed, i, SIZE), torchvision_view(plain, changed, i, [name]))
        first, second = (torchvision_view(plain, params, i, rng.permutation(NAMES).tolist()) for _ in range(2))
        add("all", render(image, params, i, SIZE), first)
        add("two orders", second, first)
    print("|  | mean | median | 90 % | largest |")
    print("|---|---|---|---|---|")
    for name, values in distances.items():
        quantiles = " | ".join(f"{x:.2f}" for x in np.quantile(values, [0.5, 0.9, 1]))
        print(f"| {name} | {np.mean(values):.2f} | {quantiles} |")


if __name__ == "__main__":
    main()
