"""How the backbone's features of a fixed sample of images spread: measures that need no labels.

- rankme: effective rank of the features, from 1 to the smaller of the numbers of images and features (RankMe, arXiv
  2210.02885, eq. 1). Within a method it follows the accuracy of a linear classifier.
- alignment: mean squared distance of two random views of an image, 0 for equal features (Wang and Isola, arXiv
  2005.10242, sec. 4.1).
- uniformity: logarithm of the mean of exp(-2 d²) over pairs of different images at distance d, 0 for equal features and
  about -3.9 for features spread evenly over a sphere of many dimensions (same section).

Alignment and uniformity are those of features at unit length. Both must fall: alignment alone also falls in a collapse.

Shape suffixes: N images, D features.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Crops
from data.sources.base import Source
from models.encoder import Encoder
from models.health import effective_rank
from trainer.evaluate.features import forward_images, image_size
from trainer.run.results import Row

if TYPE_CHECKING:
    from trainer.config import Config

SAMPLE = 512  # images


def measure_spread(encoder: Encoder, source: Source, device: torch.device, config: "Config") -> Row:
    """Return rankme, alignment and uniformity of images that are evenly distributed over the data set.

    Only this rank computes; the images and their two random views are always the same.
    """
    samples = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(np.int64))
    view = config.data.views[0].model_copy(update={"size": image_size(config)})
    augment = view.own_augment(config.data.augment)
    features = {}
    for name, crops in [
        ("center", None),
        ("first", Crops(view, augment, config.run.seed, 0)),
        ("second", Crops(view, augment, config.run.seed, 1)),
    ]:
        batches = forward_images(encoder, encoder.backbone, source, samples, device, config, crops)
        features[name] = torch.cat([x_BD for x_BD, _ in batches])
    return {
        "rankme": effective_rank(features["center"]),
        "alignment": alignment(features["first"], features["second"]),
        "uniformity": uniformity(features["center"]),
    }


def alignment(x_ND: Tensor, y_ND: Tensor) -> float:
    """Return the mean squared distance of corresponding rows, at unit length."""
    return float((F.normalize(x_ND, dim=1) - F.normalize(y_ND, dim=1)).square().sum(1).mean())


def uniformity(x_ND: Tensor) -> float:
    """Return log mean exp(-2 d²) over all pairs of rows, at unit length; 0 for a single row."""
    z_ND = F.normalize(x_ND, dim=1).double()
    if len(z_ND) == 1:
        return 0.0
    return float(torch.logsumexp(-2 * torch.pdist(z_ND).square(), 0)) - math.log(len(z_ND) * (len(z_ND) - 1) / 2)
