"""Renders the trainer's templates: the HTML pages of the reports and the Markdown of the model card.

An HTML page is self-contained. Styles, plotly.js and images (data URLs) are part of the file, and its
Content-Security-Policy forbids the browser to load anything else.
"""

import base64
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # RGB, [H, W, 3]

THUMBNAIL_SIDE = 160  # pixels: default limit for the longer side of an embedded image
CRISP_SIDE = 96  # pixels: the browser enlarges images up to this size without smoothing


def render_page(template: str, **values: Any) -> str:
    """Returns an HTML page made from a template that extends `base.html.j2`, see `render`."""
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return render(template, created=created, command=shlex.join(sys.orig_argv), **values)


def render(template: str, **values: Any) -> str:
    """Returns the text made from a template. Values are escaped in `*.html.j2` only.

    Args:
        template: The name of a file in `trainer/report/templates`.
        values: Its variables.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["plotly"] = _plotly
    environment.filters["png"] = image_data_url
    environment.filters["crisp"] = lambda image: max(image.shape[:2]) <= CRISP_SIDE
    return environment.get_template(template).render(**values)


def _plotly() -> Markup:
    """Returns the source of plotly.js, 4 MB."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def image_data_url(image: Image, max_side: int = THUMBNAIL_SIDE, jpeg_if_shrunk: bool = False) -> str:
    """Returns a data URL of an image, which is shrunk if its longer side exceeds `max_side` pixels.

    The format is PNG. With `jpeg_if_shrunk`, shrunk images are stored as JPEG, which takes less space.
    """
    import cv2

    small = thumbnail(image, max_side)
    is_jpeg = jpeg_if_shrunk and small.shape != image.shape
    kind, options = ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 85]) if is_jpeg else ("png", [])
    encoded, data = cv2.imencode(f".{kind}", small[:, :, ::-1], options)
    assert encoded, f"OpenCV did not encode a {kind.upper()}"
    return f"data:image/{kind};base64," + base64.b64encode(data.tobytes()).decode()


def thumbnail(image: Image, max_side: int = THUMBNAIL_SIDE) -> Image:
    """Returns an image, uint8 [H, W, 3], shrunk if its longer side exceeds `max_side` pixels."""
    import cv2

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"got an image of {image.dtype} {list(image.shape)}, need uint8 [H, W, 3]")
    scale = max_side / max(image.shape[:2])
    if scale < 1:
        height, width = (max(1, round(scale * side)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return image
