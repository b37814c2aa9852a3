"""Normalisation: uint8 images become float tensors with ImageNet's mean and standard deviation removed."""

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, which all published recipes use
STD = (0.229, 0.224, 0.225)

_SINGLE_THREAD = 32767  # elements: torch uses several threads from 32,768 on (at::internal::GRAIN_SIZE)


def normalize(images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Copy images to the device and normalise them there, in float32, before rounding to `dtype`.

    The copy is asynchronous if the images are in pinned memory. On a GPU no float32 copy is made.

    Args:
        images: uint8 [B, H, W, 3] RGB, on any device.
        device: Device of the result.
        dtype: Type of the result.

    Returns:
        `dtype` [B, 3, H, W] in channels_last format, which keeps the order of the bytes.
    """
    images = images.to(device, non_blocking=True)
    return normalize_fused(images, dtype) if images.is_cuda else _normalize_in_chunks(images).to(dtype)


def normalize_fused(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise uint8 [B, H, W, 3] to `dtype` [B, 3, H, W] in one operation, the fastest way on a GPU."""
    rows, scale, bias = _rows(images)
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)  # takes numbers that were computed in float32
    return _images(torch.addcmul(bias, rows, scale, out=out), images.shape)


def _normalize_in_chunks(images: Tensor) -> Tensor:
    """Normalise uint8 [B, H, W, 3] to float32 [B, 3, H, W] with one thread, the fastest way on a CPU.

    An operation with two types is ten times slower on a CPU, so each chunk is converted and then scaled in place.
    Chunks stay in the cache and are too small for torch to use several threads: idle threads would spin between the
    operations on cores that data workers need for decoding.
    """
    rows, scale, bias = _rows(images)
    normalized = torch.empty(rows.shape, dtype=torch.float32)
    chunk = max(1, _SINGLE_THREAD // rows.shape[1])
    for out, raw in zip(normalized.split(chunk), rows.split(chunk), strict=True):
        torch.addcmul(bias, out.copy_(raw), scale, out=out)
    return _images(normalized, images.shape)


def _rows(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return images as rows of pixels, [B * H, W * 3], with the scale and the bias of a row."""
    scale, bias = _scale_and_bias(images.device, images.shape[2])
    return rearrange(images, "b h w c -> (b h) (w c)"), scale, bias


def _images(rows: Tensor, shape: torch.Size) -> Tensor:
    return rearrange(rows, "(b h) (w c) -> b c h w", h=shape[1], w=shape[2])


@lru_cache(maxsize=64)
def _scale_and_bias(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Return float32 [width * 3] each, such that `scale * pixel + bias` normalises a row of pixels in 0..255.

    They are cached because making them on a GPU waits for a copy from the host.
    """
    std, mean = torch.tensor(STD, device=device), torch.tensor(MEAN, device=device)
    return (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
