"""Tensors as they lie in memory: dense layouts, and bit masks in storage order.

A bit mask has one bit per element, least significant bit first, ceil(n / 8) bytes per tensor.
"""

import torch
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """bool [n] -> uint8 [ceil(n / 8)]; the unused bits of the last byte are 0."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """uint8 [ceil(numel / 8)] -> bool [numel]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).bool().flatten()[:numel]


def is_dense(tensor: Tensor) -> bool:
    """Dense layout: the elements fill one block of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_layout_of(tensor: Tensor, like: Tensor) -> bool:
    """Equal layouts of two tensors of one shape: elements in the same order; dimensions of one have any stride."""
    if tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous()):
        return True
    strides = zip(tensor.stride(), like.stride(), tensor.shape, strict=True)
    return all(first == second for first, second, size in strides if size != 1)


def flat(tensor: Tensor) -> Tensor:
    """1-D view of a dense tensor in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,))
