"""A linear classifier on a backbone, and its accuracy.

Shape suffixes: B images of a rank's batch, D features, C classes.
"""

from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pydantic import AfterValidator
from torch import Tensor, nn

from data.sources.base import Source
from data.views import Augment
from models.encoder import Encoder
from trainer.evaluate.base import EvaluationContext
from trainer.evaluate.features import forward_images

MOMENTUM = 0.9  # of SGD, in every protocol
CROPS_AND_FLIPS = Augment(jitter=0, gray=0, blur=0)  # the augmentation of training images in every protocol


def _check_scale(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 < low <= high <= 1:
        raise ValueError("need (low, high) with 0 < low <= high <= 1")
    return value


CropScale = Annotated[tuple[float, float], AfterValidator(_check_scale)]


class Classifier(nn.Module):
    """An encoder's backbone and a linear layer, which computes in fp32.

    The initial weights are drawn from N(0, 0.01²) and the bias is 0, as in the published protocols.
    """

    def __init__(self, encoder: Encoder, classes: int, *, frozen: bool, seed: int) -> None:
        """Use the backbone of `encoder`, without a copy.

        Args:
            encoder: The encoder.
            classes: Number of classes.
            frozen: Do not train the backbone, and keep it in evaluation mode even if the classifier is in training
                mode, so that BatchNorm's running statistics do not change.
            seed: Seed of the initial weights.
        """
        super().__init__()
        self.backbone, self.frozen = encoder.backbone, frozen
        projection = encoder.head[0]
        assert isinstance(projection, nn.Linear)
        weight_CD = torch.empty(classes, projection.in_features)
        weight_CD.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        self.head = nn.Linear(projection.in_features, classes)
        self.head.load_state_dict({"weight": weight_CD, "bias": torch.zeros(classes)})
        self.head.to(projection.weight.device)
        self.backbone.requires_grad_(not frozen)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, fp32 [B, C], of normalised images [B, 3, H, W]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x_BD = self.backbone(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            logits_BC: Tensor = self.head(x_BD.float())
        return logits_BC

    def train(self, mode: bool = True) -> "Classifier":
        """Set training mode, except for a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


class Score(NamedTuple):
    """Accuracy on the test images.

    Attributes:
        top1: Share of the images whose class has the largest logit.
        top5: Share of the images whose class is among the five largest logits.
        images: Number of images that could be read.
        unreadable: Number of images that could not be read.
    """

    top1: float
    top5: float
    images: int
    unreadable: int


def score(network: Classifier, test: Source, classes: list[str], context: EvaluationContext) -> Score:
    """Return the accuracy on the central views of the test images. Collective.

    Args:
        network: The classifier.
        test: The test images.
        classes: The classes of the training images, in the order of the logits.
        context: The evaluation.

    Raises:
        ValueError: On all ranks, if no image can be read.
    """
    rank_info = context.rank_info
    labels_C = torch.tensor([classes.index(name) for name in test.classes])
    mine = np.arange(rank_info.rank, len(test), rank_info.world_size)
    counts = torch.zeros(3, dtype=torch.int64, device=rank_info.device)  # correct at 1, correct at 5, all
    for logits_BC, samples in forward_images(network, network, test, mine, rank_info.device, context.config):
        labels_B1 = labels_C[torch.from_numpy(test.labels)[samples]].to(rank_info.device)[:, None]
        hit_B5 = logits_BC.topk(min(5, len(classes))).indices == labels_B1
        counts += torch.stack([hit_B5[:, 0].sum(), hit_B5.sum(), torch.tensor(len(samples), device=rank_info.device)])
    dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    if not images:
        raise ValueError(f"data.val: none of {len(test)} images can be read")
    return Score(top1 / images, top5 / images, images, len(test) - images)
