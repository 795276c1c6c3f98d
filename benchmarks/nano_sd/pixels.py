"""Images as the networks take them, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rgb(images: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] of grey uint8 [B, H, W]."""
    return (images.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def as_grey(images: Tensor) -> Tensor:
    """uint8 [B, H, W] of uint8 RGB [B, H, W, 3]: the mean of the channels."""
    return images.float().mean(-1).round().to(torch.uint8)
