"""Moments of 8 bits: the specification, in kernels/README.md, as eager operators; all implementations give its bits."""

import torch
from torch import Tensor

BLOCK = 256
SMALLEST_NORMAL = 2.0**-126
# The dither's steps from one applied step to the next, and from one element to the next, modulo 2^32.
DITHER_OF_STEP, DITHER_OF_ELEMENT = 0x9E3779B1, 0x85EBCA6B


def per_element(absmax: Tensor, numel: int) -> Tensor:
    """fp32 [ceil(numel / 256)] -> [numel]: the value of each element's block."""
    return absmax.repeat_interleave(BLOCK, output_size=absmax.numel() * BLOCK)[:numel]


def decode_signed(codes: Tensor, absmax: Tensor) -> Tensor:
    """int8 [n] -> m, fp32 [n]."""
    root = codes.float() * (1.0 / 127.0)
    return root * root.abs() * per_element(absmax, codes.numel())


def decode_unsigned(codes: Tensor, absmax: Tensor) -> Tensor:
    """uint8 [n] -> v, fp32 [n]."""
    root = codes.float() * (1.0 / 255.0)
    square = root * root
    return square * square * per_element(absmax, codes.numel())


def encode_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """m, fp32 [n] -> int8 codes [n] and the absmax of each block."""
    absmax, inverse = block_scales(values)
    root = at_most_one((values.abs() * inverse).sqrt())
    magnitude = (127.0 * root + 0.5).to(torch.int32)
    return torch.where(values < 0.0, -magnitude, magnitude).to(torch.int8), absmax


def encode_unsigned(values: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """v, fp32 [n] -> uint8 codes [n], rounded up or down by the dither of this applied step, and the absmax."""
    absmax, inverse = block_scales(values)
    root = at_most_one((values * inverse).sqrt().sqrt())
    magnitude = (255.0 * root + dither(step, values.numel())).to(torch.int32)
    return torch.maximum(magnitude, (values > 0.0).to(torch.int32)).to(torch.uint8), absmax


def block_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """The absmax of each block, and for each element what it is multiplied with before a root."""
    blocks = torch.nn.functional.pad(values.abs(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.amax(dim=1)
    inverse = torch.where(absmax < SMALLEST_NORMAL, torch.zeros_like(absmax), 1.0 / absmax)
    return absmax, per_element(inverse, values.numel())


def at_most_one(root: Tensor) -> Tensor:
    """NaN becomes 1: the block's absmax is NaN already."""
    return torch.where(root < 1.0, root, torch.ones_like(root))


def dither(step: Tensor, numel: int) -> Tensor:
    """fp32 [numel] in [0, 1): equally spread along the steps of an element and along the elements of a step."""
    element = torch.arange(numel, dtype=torch.int64, device=step.device)
    word = step.long() * DITHER_OF_STEP + element * DITHER_OF_ELEMENT
    return ((word >> 16) & 0xFFFF).float() * 2.0**-16
