"""Counter-based noise: the same (seed, step, role, sample id, element) gives the same bits everywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from erasediff_kernels.ops._checks import DATA_DTYPES, check_address, check_choice

DISTRIBUTIONS = ("normal", "uniform")


def philox_bits(sample_ids: Tensor, key: Tensor, role: int, words: int) -> Tensor:
    """The first words of each sample's Philox4x32-10 stream (Salmon et al., SC 2011).

    Args:
        sample_ids: int64 [B]; 56 bits of each are used.
        key: int64 [2] = (seed, step), on the same device. Nothing is copied to the host.
        role: 0 .. 255, keeps streams of different purposes apart.
        words: how many words per sample.

    Returns:
        int64 [B, words] with values in [0, 2^32).

    Raises:
        ValueError: for other shapes, dtypes, devices or a role out of range.
    """
    check_address(sample_ids, key, role)
    if words < 0:
        raise ValueError(f"words is {words}; it cannot be negative")
    result: Tensor = torch.ops.erasediff.philox_bits(sample_ids, key, role, words)
    return result


def philox_noise(
    sample_ids: Tensor,
    key: Tensor,
    role: int,
    shape: Sequence[int],
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise of shape [B, *shape], the same bits on every device and in every implementation.

    Drawn in fp32, N(0, 1) by Box-Muller or U[0, 1) on the grid of 2^-24, and then converted to `dtype`. An element's
    value depends on its place in the sample in C order, not on B or on strides.

    Args:
        sample_ids, key, role: the address, as in `philox_bits`.
        shape: the sample's own dimensions.
        distribution: "normal" or "uniform".
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: for an invalid address, distribution or dtype.
    """
    check_address(sample_ids, key, role)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    if dtype not in DATA_DTYPES:
        raise ValueError(f"dtype is {dtype}; choose float32, bfloat16, float16 or float64")
    result: Tensor = torch.ops.erasediff.philox_noise(sample_ids, key, role, shape, distribution, dtype)
    return result
