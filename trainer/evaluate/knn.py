"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al., arXiv 1805.01978, sec. 3.4).

Two conventions are in use: DINO's, k = 20 and temperature 0.07, and that of the original paper and of lightly's
benchmarks, k = 200 and temperature 0.1. They differ by a point or so: say which with the number.

N features of a rank, M = all ranks' queries of a chunk, C classes, D dimensions, R ranks.
"""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data.sources.open import Source
from models.encoder import Encoder
from trainer.config import Config
from trainer.evaluate.features import Features, embed

_CHUNK = 512  # queries of a rank at a time


def accuracy(train: Features, test: Features, classes: int, k: int, temperature: float) -> float:
    """The share of all ranks' test features that the vote of their k nearest train features gets right.

    Each rank holds its own part of both sets, of any size. A neighbour votes with weight exp(similarity / temperature).
    """
    world_size, device = dist.get_world_size(), test.x_ND.device
    k = min(k, _over_ranks(len(train.x_ND), dist.ReduceOp.SUM, device))
    rounds = -(-_over_ranks(len(test.x_ND), dist.ReduceOp.MAX, device) // _CHUNK)
    correct = torch.zeros((), device=device)
    for i in range(rounds):
        own_ND = test.x_ND[i * _CHUNK : (i + 1) * _CHUNK]
        padded_ND = F.pad(own_ND, (0, 0, 0, _CHUNK - len(own_ND)))
        all_MD = padded_ND.new_empty(world_size * _CHUNK, own_ND.shape[1])
        dist.all_gather_single(all_MD, padded_ND)
        similarity_Mk, label_Mk = _nearest(all_MD, train, k)
        # Every rank's neighbours of every rank's queries: to each the ones of its own.
        similarity_RNk, label_RNk = torch.empty_like(similarity_Mk), torch.empty_like(label_Mk)
        dist.all_to_all_single(similarity_RNk, similarity_Mk)
        dist.all_to_all_single(label_RNk, label_Mk)
        similarity_NK = rearrange(similarity_RNk, "(r n) k -> n (r k)", r=world_size)[: len(own_ND)]
        label_NK = rearrange(label_RNk, "(r n) k -> n (r k)", r=world_size)[: len(own_ND)]
        best_Nk, place_Nk = similarity_NK.topk(k, dim=1)
        votes_NC = torch.zeros(len(own_ND), classes, device=device)
        weight_Nk = torch.exp((best_Nk - 1) / temperature)  # -1: the largest is 1, for fp32 at low temperatures
        votes_NC.scatter_add_(1, label_NK.gather(1, place_Nk), weight_Nk)
        correct += (votes_NC.argmax(1) == test.labels_N[i * _CHUNK : (i + 1) * _CHUNK]).sum()
    dist.all_reduce(correct)
    return float(correct) / _over_ranks(len(test.x_ND), dist.ReduceOp.SUM, device)


def evaluate(encoder: Encoder, train: Source, test: Source, device: torch.device, config: Config) -> float:
    """kNN accuracy of the encoder's backbone; every rank embeds each R-th sample, none twice."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for source in (train, test):
        if len(source) < world_size:
            raise ValueError(f"kNN: {len(source)} images are too few for {world_size} ranks")
    train_part, test_part = (
        embed(encoder, source, np.arange(rank, len(source), world_size), device, config) for source in (train, test)
    )
    # The two sets may list their classes differently.
    labels_C = torch.tensor([train.classes.index(name) for name in test.classes], device=device)
    test_part = test_part._replace(labels_N=labels_C[test_part.labels_N])
    return accuracy(train_part, test_part, len(train.classes), config.eval.k, config.eval.temperature)


def _nearest(q_MD: Tensor, train: Features, k: int) -> tuple[Tensor, Tensor]:
    """Similarity and label of the k nearest of this rank's train features, [M, k]; -inf where there are fewer."""
    similarity_Mk, place_Mk = (q_MD @ train.x_ND.T).topk(min(k, len(train.x_ND)), dim=1)
    missing = (0, k - similarity_Mk.shape[1])
    return F.pad(similarity_Mk, missing, value=float("-inf")), F.pad(train.labels_N[place_Mk], missing)


def _over_ranks(count: int, operation: dist.ReduceOp.RedOpType, device: torch.device) -> int:
    x = torch.tensor(count, device=device)
    dist.all_reduce(x, operation)
    return int(x)
