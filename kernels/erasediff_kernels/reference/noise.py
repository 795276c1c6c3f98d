"""Reference of `philox_bits`, `philox_noise` and `add_noise`."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from erasediff_kernels.reference import philox


def philox_bits(sample_ids: Tensor, key: Tensor, role: int, words: int) -> Tensor:
    return philox.words(sample_ids, key, role, words).contiguous()


def philox_noise(
    sample_ids: Tensor, key: Tensor, role: int, shape: Sequence[int], distribution: str, dtype: torch.dtype
) -> Tensor:
    drawn = philox.noise(sample_ids, key, role, prod(shape), distribution)
    return drawn.to(dtype).reshape(sample_ids.shape[0], *shape).contiguous()


def add_noise(
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    sample_ids: Tensor | None,
    key: Tensor | None,
    role: int,
) -> Tensor:
    x = widen(sample)
    epsilon = given_or_drawn(noise, sample, sample_ids, key, role, "normal")
    return (per_sample(alpha, x) * x + per_sample(sigma, x) * epsilon).to(sample.dtype).contiguous()


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the type that arithmetic is done in: fp32, or fp64 where it is fp64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rows(tensor: Tensor) -> Tensor:
    """[B, ...] -> [B, N]; `flatten(1)` would reject samples without dimensions."""
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))


def per_sample(vector: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in the dtype of `like`."""
    return vector.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def given_or_drawn(
    given: Tensor | None, like: Tensor, sample_ids: Tensor | None, key: Tensor | None, role: int, distribution: str
) -> Tensor:
    """Noise of the shape of `like` [B, ...], widened; drawn noise is fp32 and is never rounded to a half type."""
    if given is not None:
        return widen(given)
    assert sample_ids is not None
    assert key is not None
    drawn = philox_noise(sample_ids, key, role, like.shape[1:], distribution, torch.float32)
    return drawn.double() if like.dtype == torch.float64 else drawn
