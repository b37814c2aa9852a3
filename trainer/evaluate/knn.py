"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al., arXiv 1805.01978, sec. 3.4).

Two conventions are in use: k = 20 and temperature 0.07 (DINO), and k = 200 and temperature 0.1 (the original paper and
lightly's benchmarks). They differ by about a point, so the results name both numbers.

The same evaluation of the pixels says what the images give without an encoder: data sets of small, aligned images are
classified well by their pixels.

Shape suffixes: N features of a rank, M queries of all ranks in a chunk, C classes, D dimensions, R ranks, k neighbours.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from data.sources.base import Source
from models.compat import all_gather_single
from trainer.evaluate.base import EvaluationContext, Evaluator, Results, labelled_sources
from trainer.evaluate.features import Features, embed, image_size
from trainer.schema import Section

if TYPE_CHECKING:
    from trainer.config import Config

MAX_PIXEL_BYTES = 2**30  # of the pixels of all images as fp32; 70,000 images of 28 x 28 pixels take 0.7e9

_CHUNK = 512  # queries of a rank that are classified together


class Settings(Section):
    """kNN on the frozen backbone, the linear probe while training, and what all evaluations share."""

    knn_every: int = Field(
        10, ge=0, description="Epochs between kNN evaluations while training; 0: at the start and end only."
    )
    k: int = Field(200, ge=1, description="Number of neighbours.")
    temperature: float = Field(0.1, gt=0, description="Temperature of the neighbours' votes.")
    probe: bool | None = Field(
        None,
        description="Train a linear classifier beside the encoder, on detached features of the backbone; null: if the "
        "training images have 2 to 4,096 classes.",
    )
    batch_size: int = Field(256, ge=1, description="Images per forward pass of a rank, in every evaluation.")
    size: int | None = Field(
        None, ge=8, description="Side of the images in pixels, in every evaluation; null: that of the first view."
    )
    crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Side of the central crop as a share of the shorter side, in every evaluation; null: 0.875 for "
        "images larger than `size`, 1 for others. 0.875 also enlarges the small images of ImageNet, as torchvision "
        "does.",
    )


def _folder_name(config: "Config", trained: "Config") -> str:
    k, temperature = config.eval.k, config.eval.temperature
    same = (k, temperature) == (trained.eval.k, trained.eval.temperature)
    return "knn" if same else f"knn-k{k}-t{temperature:g}"


def _settings(config: "Config") -> dict[str, object]:
    return {"k": config.eval.k, "temperature": config.eval.temperature}


def _evaluate(context: EvaluationContext) -> Results:
    sources, device, config = context.sources, context.rank_info.device, context.config
    train, val = sources["train"], sources["val"]
    more_val = {name.removeprefix("more_val."): source for name, source in sources.items() if "." in name}
    with context.interruptible():
        values = evaluate(context.encoder.backbone, train, name_tests(val, more_val), device, config)
        pixels = evaluate_pixels(train, val, device, config)
    return {**values, **pixels, "protocol": "weighted kNN", "k": config.eval.k, "temperature": config.eval.temperature}


EVALUATOR = Evaluator(_folder_name, _settings, _evaluate, partial(labelled_sources, more=True))


def name_tests(val: Source, more_val: dict[str, Source]) -> dict[str, Source]:
    """Return the sets of test images by the names of their kNN accuracies."""
    return {"knn": val, **{f"knn_{name}": source for name, source in more_val.items()}}


def evaluate_pixels(train: Source, test: Source, device: torch.device, config: "Config") -> Results:
    """Return the kNN accuracy of the pixels as `knn_pixels`, or {} where they take too much memory. Collective.

    The pixels are those that the backbone gets: normalised, of the same views.
    """
    size = 4 * 3 * image_size(config) ** 2 * (len(train) + len(test))
    return evaluate(nn.Flatten(), train, {"knn_pixels": test}, device, config) if size <= MAX_PIXEL_BYTES else {}


def evaluate(
    network: nn.Module,
    train: Source,
    tests: dict[str, Source],
    device: torch.device,
    config: "Config",
    score: Callable[[str, Features], dict[str, float]] = lambda name, features: {},
) -> dict[str, float]:
    """Return the kNN accuracy of a network's features on each set of test images, by its name in `tests`. Collective.

    Args:
        network: Maps images [B, 3, S, S] to features [B, D]: a backbone, or `nn.Flatten()` for the pixels.
        train: The images with known labels.
        tests: The images to classify.
        device: Where the network is.
        config: Gives k, temperature, and what `features.embed` needs.
        score: Returns further numbers about this rank's features of the test set of that name.

    Raises:
        ValueError: A data set has fewer images than there are ranks.
    """
    rank, world_size, settings = dist.get_rank(), dist.get_world_size(), config.eval
    for source in (train, *tests.values()):
        if len(source) < world_size:
            raise ValueError(f"kNN: {len(source)} images are too few for {world_size} ranks")

    def features_of(source: Source) -> Features:
        return embed(network, source, np.arange(rank, len(source), world_size), device, config)

    train_features = features_of(train)
    accuracies = {}
    for name, test in tests.items():
        test_features = features_of(test)
        # The two data sets may list their classes in different orders.
        labels_C = torch.tensor([train.classes.index(name) for name in test.classes], device=device)
        test_features = test_features._replace(labels_N=labels_C[test_features.labels_N])
        accuracies[name] = accuracy(train_features, test_features, len(train.classes), settings.k, settings.temperature)
        accuracies |= score(name, test_features)
    return accuracies


def accuracy(train: Features, test: Features, classes: int, k: int, temperature: float) -> float:
    """Return the share of all ranks' test features that their k nearest train features classify correctly. Collective.

    A neighbour votes for its class with weight exp(similarity / temperature).

    Args:
        train: This rank's train features; the number may differ between ranks.
        test: This rank's test features, likewise.
        classes: Number of classes.
        k: Number of neighbours; at most the number of all ranks' train features is used.
        temperature: Temperature of the votes.
    """
    world_size, device = dist.get_world_size(), test.x_ND.device
    k = min(k, _over_ranks(len(train.x_ND), dist.ReduceOp.SUM, device))
    chunks = -(-_over_ranks(len(test.x_ND), dist.ReduceOp.MAX, device) // _CHUNK)
    correct = torch.zeros((), device=device)
    for i in range(chunks):
        own_ND = test.x_ND[i * _CHUNK : (i + 1) * _CHUNK]
        padded_ND = F.pad(own_ND, (0, 0, 0, _CHUNK - len(own_ND)))
        all_MD = padded_ND.new_empty(world_size * _CHUNK, own_ND.shape[1])
        all_gather_single(all_MD, padded_ND)
        similarity_Mk, label_Mk = _nearest(all_MD, train, k)
        # Each rank has found neighbours for all ranks' queries: send them to the ranks of the queries.
        similarity_RNk, label_RNk = torch.empty_like(similarity_Mk), torch.empty_like(label_Mk)
        dist.all_to_all_single(similarity_RNk, similarity_Mk)
        dist.all_to_all_single(label_RNk, label_Mk)
        similarity_NK = rearrange(similarity_RNk, "(r n) k -> n (r k)", r=world_size)[: len(own_ND)]
        label_NK = rearrange(label_RNk, "(r n) k -> n (r k)", r=world_size)[: len(own_ND)]
        best_Nk, index_Nk = similarity_NK.topk(k, dim=1)
        votes_NC = torch.zeros(len(own_ND), classes, device=device)
        # Relative to the nearest, so that the weights neither overflow nor all become 0 at low temperatures.
        weight_Nk = torch.exp((best_Nk - best_Nk[:, :1]) / temperature)
        votes_NC.scatter_add_(1, label_NK.gather(1, index_Nk), weight_Nk)
        correct += (votes_NC.argmax(1) == test.labels_N[i * _CHUNK : (i + 1) * _CHUNK]).sum()
    dist.all_reduce(correct)
    return float(correct) / _over_ranks(len(test.x_ND), dist.ReduceOp.SUM, device)


def _nearest(q_MD: Tensor, train: Features, k: int) -> tuple[Tensor, Tensor]:
    """Return similarity and label of the k nearest of this rank's train features, both [M, k].

    Where the rank has fewer than k features, the similarity is -inf.
    """
    similarity_Mk, index_Mk = (q_MD @ train.x_ND.T).topk(min(k, len(train.x_ND)), dim=1)
    missing = (0, k - similarity_Mk.shape[1])
    return F.pad(similarity_Mk, missing, value=float("-inf")), F.pad(train.labels_N[index_Mk], missing)


def _over_ranks(count: int, operation: dist.ReduceOp.RedOpType, device: torch.device) -> int:
    x = torch.tensor(count, device=device)
    dist.all_reduce(x, operation)
    return int(x)
