"""One self-contained HTML page of embedded pictures: a map where hovering shows the picture, and nearest neighbours.

As the report it loads nothing from anywhere. P points, D dimensions, K neighbours.
"""

import base64
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources.open import Source

NEIGHBOURS = 12
THUMBNAIL = 96  # pixels of the longer side
MAX_POINTS = 5000  # a thumbnail is about 2 to 3 kB
MAX_CLASSES = 20  # with a colour and an entry in the legend of their own


def render_page(title: str, x_PD: NDArray[np.float32], samples_P: NDArray[np.int64], source: Source, total: int) -> str:
    """The page, as HTML, of the features of some samples of `source`, out of `total` that were embedded."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    unit_PD = x_PD / np.maximum(np.linalg.norm(x_PD, axis=1, keepdims=True), 1e-12)
    position_P2 = map_2d(unit_PD)
    neighbour_PK, similarity_PK = nearest(unit_PD, NEIGHBOURS)
    names, labels = zip(*(name_and_label(source, i) for i in samples_P.tolist()), strict=True)
    classes = sorted(set(labels))
    points = {
        "x": position_P2[:, 0].round(3).tolist(),
        "y": position_P2[:, 1].round(3).tolist(),
        "names": names,
        "classes": classes,
        "labels": [classes.index(label) for label in labels],
        "neighbours": neighbour_PK.tolist(),
        "similarities": similarity_PK.round(3).tolist(),
        "thumbnails": [thumbnail(source.image(i)) for i in samples_P.tolist()],
        "separate": len(classes) <= MAX_CLASSES,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("embed.html.j2").render(
        title=title,
        shown=len(samples_P),
        total=total,
        dims=x_PD.shape[1],
        points=points,
        plotly=Markup(get_plotlyjs()),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(sys.orig_argv),
    )


def name_and_label(source: Source, sample: int) -> tuple[str, str]:
    """In valid Unicode: a file's name may hold any bytes."""
    texts = (source.name(sample), source.classes[source.labels[sample]])
    name, label = (text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for text in texts)
    return name, label


def map_2d(unit_PD: NDArray[np.float32]) -> NDArray[np.float32]:
    """t-SNE (van der Maaten and Hinton, 2008) of the first 50 principal components, [P, 2]; of few points these."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(unit_PD)
    components = min(50, *unit_PD.shape)
    x_PC = PCA(components, random_state=0).fit_transform(unit_PD) if count > 1 else np.zeros((1, 1), np.float32)
    if count < 10:
        return np.pad(x_PC, ((0, 0), (0, 1)))[:, :2]
    tsne = TSNE(perplexity=min(30, (count - 1) / 3), init="random" if components < 2 else "pca", random_state=0)
    position_P2: NDArray[np.float32] = tsne.fit_transform(x_PC)
    return position_P2


def nearest(unit_PD: NDArray[np.float32], most: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The other points of largest cosine, first the nearest, and the cosines: [P, K] each, K = `most` or P - 1."""
    similarity_PP = unit_PD @ unit_PD.T
    np.fill_diagonal(similarity_PP, -np.inf)
    order_PK = np.argsort(-similarity_PP, axis=1)[:, : min(most, len(unit_PD) - 1)]
    return order_PK, np.take_along_axis(similarity_PP, order_PK, axis=1)


def thumbnail(image: NDArray[np.uint8]) -> str:
    """A uint8 RGB picture [H, W, 3] as a data URL: PNG if it is as small as a thumbnail, else a smaller JPEG."""
    import cv2

    scale = THUMBNAIL / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    kind = "jpeg" if scale < 1 else "png"
    written, data = cv2.imencode(f".{kind}", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85] if scale < 1 else [])
    assert written, "OpenCV refused to write a thumbnail"
    return f"data:image/{kind};base64," + base64.b64encode(data.tobytes()).decode()
