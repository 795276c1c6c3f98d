"""Stochastic rounding of fp32 to a half type: up with probability equal to the fraction of the gap already covered."""

import torch
from torch import Tensor

from erasediff_kernels.reference import philox

ROLE = 255
INFINITY_BITS = 0x7F800000
SMALLEST_NORMAL_HALF_BITS = 0x38800000  # 2^-14 as fp32


def random_words(index: int, key: Tensor, numel: int) -> Tensor:
    """int64 [numel]: the words for the tensor at place `index` of the list."""
    return philox.words(torch.tensor([index], device=key.device), key, ROLE, numel)[0]


def stochastic_round(x: Tensor, dtype: torch.dtype, word: Tensor) -> Tensor:
    """fp32 [n] rounded to bfloat16 or float16 with the low 16 (bfloat16) or 13 (float16) bits of `word`.

    The random bits are added to the bits of |x| that the half type drops, and the sum is truncated. Below 2^-14 the gap
    of float16 is constant: there the low 16 bits decide as a fraction. Infinities and NaN are kept.
    """
    dropped = (1 << 16) - 1 if dtype == torch.bfloat16 else (1 << 13) - 1
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    rounded_bits = (bits + (word & dropped).int()) & ~dropped
    rounded = rounded_bits.view(torch.float32)
    if dtype == torch.float16:
        steps = x.abs() * 2.0**24
        floor = steps.floor()
        fraction = (word & 0xFFFF).float() * 2.0**-16
        subnormal = torch.copysign((floor + (steps - floor > fraction).float()) * 2.0**-24, x)
        rounded = torch.where(magnitude < SMALLEST_NORMAL_HALF_BITS, subnormal, rounded)
    return torch.where(magnitude < INFINITY_BITS, rounded, x).to(dtype)
