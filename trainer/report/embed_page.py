"""The page of embedded images: a 2-D map that shows the image under the pointer, and nearest neighbours.

Shapes: P points, D dimensions, K neighbours.
"""

import numpy as np
from numpy.typing import NDArray

from data.sources.base import Source
from trainer.report.page import image_data_url, render_page

NEIGHBOURS = 12
THUMBNAIL_SIDE = 96  # pixels; a thumbnail has 2 to 3 kB
MAX_CLASSES = 20  # that have their own colour and legend entry


def render_embeddings(
    title: str, x_PD: NDArray[np.float32], samples_P: NDArray[np.int64], source: Source, total: int
) -> str:
    """Returns the page as HTML.

    Args:
        title: Title of the page.
        x_PD: Features of the images on the map, [P, D].
        samples_P: Their indices in `source`, [P].
        source: The images, whose thumbnails are part of the page.
        total: Number of images that were embedded, of which the map shows P.
    """
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
        "thumbnails": [
            image_data_url(source.image(i), THUMBNAIL_SIDE, jpeg_if_shrunk=True) for i in samples_P.tolist()
        ],
        "separate": len(classes) <= MAX_CLASSES,
    }
    return render_page(
        "embed.html.j2",
        title=title,
        shown=len(samples_P),
        total=total,
        dims=x_PD.shape[1],
        points=points,
    )


def name_and_label(source: Source, sample: int) -> tuple[str, str]:
    """Returns the name and the class of an image."""
    return source.name(sample), source.classes[source.labels[sample]]


def map_2d(unit_PD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns positions [P, 2]: t-SNE (van der Maaten and Hinton, 2008) of the first 50 principal components.

    With fewer than 10 points, the positions are the first two components.
    """
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
    """Returns the nearest other points by cosine similarity, nearest first, and the similarities.

    Args:
        unit_PD: Unit rows, [P, D].
        most: Number of neighbours K, which is reduced to P - 1 if there are fewer points.

    Returns:
        Indices [P, K] and cosine similarities [P, K].
    """
    similarity_PP = unit_PD @ unit_PD.T
    np.fill_diagonal(similarity_PP, -np.inf)
    order_PK = np.argsort(-similarity_PP, axis=1)[:, : min(most, len(unit_PD) - 1)]
    return order_PK, np.take_along_axis(similarity_PP, order_PK, axis=1)
