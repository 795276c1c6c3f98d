"""Conversion of image tensors for the libraries that judges use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Parts of ``images`` [N, ...] of at most ``size`` images, none of them empty."""
    if len(images):
        yield from torch.split(images, size)


def pictures(images: Tensor) -> list[Image.Image]:
    """Images uint8 [N, 3, H, W] as RGB pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]
