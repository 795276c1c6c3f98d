# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Device functions that several kernels share: Philox noise, rounding, bit masks.

`reference/philox.py` fixes the order of the fp32 operations of the noise. Kernels that draw are launched with
enable_fp_fusion=False, so that no product and sum become one rounding.
"""

import os
import struct
from typing import Any

import torch
import triton
import triton.language as tl

from erasediff_kernels.reference import philox, rounding

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# A warp has 32 lanes on NVIDIA and 64 on AMD's data-centre GPUs.
LANES = 64 if torch.version.hip else 32

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
}

M0, M1 = tl.constexpr(philox.MULTIPLIERS[0]), tl.constexpr(philox.MULTIPLIERS[1])
W0, W1 = tl.constexpr(philox.WEYL[0]), tl.constexpr(philox.WEYL[1])
ROUNDS = tl.constexpr(philox.ROUNDS)
LN_POLYNOMIAL = tl.constexpr(philox.LN_POLYNOMIAL)
SIN_POLYNOMIAL = tl.constexpr(philox.SIN_POLYNOMIAL)
COS_POLYNOMIAL = tl.constexpr(philox.COS_POLYNOMIAL)
LN_COUNT, SIN_COUNT, COS_COUNT = (
    tl.constexpr(len(c)) for c in (philox.LN_POLYNOMIAL, philox.SIN_POLYNOMIAL, philox.COS_POLYNOMIAL)
)
LN2_HIGH, LN2_LOW = tl.constexpr(philox.LN2_HIGH), tl.constexpr(philox.LN2_LOW)
SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
ROUNDING_ROLE = tl.constexpr(rounding.ROLE)
INFINITY_BITS = tl.constexpr(rounding.INFINITY_BITS)
SMALLEST_NORMAL_HALF_BITS = tl.constexpr(rounding.SMALLEST_NORMAL_HALF_BITS)
TRITON_INTERPRETED = tl.constexpr(INTERPRETED)


def double_bits(value: float) -> int:
    """The bits of a double as an int64 argument: Triton would narrow a Python float to fp32."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


@triton.jit
def as_double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, M0), c0 * M0
        high1, low1 = tl.umulhi(c2, M1), c2 * M1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@triton.jit
def draw_words(first_element, sample_id, key_ptr, role, BLOCK: tl.constexpr):
    """Four uint32 vectors [BLOCK / 4]: the words of elements first_element + 4 i + 0, 1, 2, 3."""
    seed = tl.load(key_ptr)
    step = tl.load(key_ptr + 1)
    block = (first_element // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    sample_low = sample_id.to(tl.uint32)
    sample_high = (sample_id >> 32).to(tl.uint32) & 0xFFFFFF
    c3 = tl.cast((role & 0xFF) << 24, tl.uint32) | sample_high
    return philox4x32(block, sample_low, step.to(tl.uint32), c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def in_element_order(x0, x1, x2, x3):
    """[n] each -> [4 n]: x0[0], x1[0], x2[0], x3[0], x0[1], ..."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def horner(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    y = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, COUNT):
        y = y * x + COEFFICIENTS[i]
    return y


@triton.jit
def ln(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    k = exponent.to(tl.float32)
    z = f * f
    y = horner(f, LN_POLYNOMIAL, LN_COUNT) * f * z
    y = y + k * LN2_LOW
    y = y - z * 0.5
    y = f + y
    return y + k * LN2_HIGH


@triton.jit
def cos_sin_turn(turn):
    quadrant = (turn + (1 << 21)) >> 22
    y = (turn - (quadrant << 22)).to(tl.float32) * (2.0**-22)
    z = y * y
    sine = horner(z, SIN_POLYNOMIAL, SIN_COUNT) * y
    cosine = horner(z, COS_POLYNOMIAL, COS_COUNT) * z + 1.0
    swap = (quadrant & 1) == 1
    cos_turn = tl.where(swap, sine, cosine)
    sin_turn = tl.where(swap, cosine, sine)
    cos_turn = tl.where(((quadrant + 1) & 2) == 2, -cos_turn, cos_turn)
    sin_turn = tl.where((quadrant & 2) == 2, -sin_turn, sin_turn)
    return cos_turn, sin_turn


@triton.jit
def box_muller(a, b):
    u = a.to(tl.float32) * (2.0**-32) + (2.0**-33)
    radius = tl.sqrt_rn(ln(u) * -2.0)
    cosine, sine = cos_sin_turn((b >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def uniform(word):
    return (word >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def draw_noise(first_element, sample_id, key_ptr, role, DISTRIBUTION: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [BLOCK] of noise from element `first_element`, a multiple of 4, on."""
    w0, w1, w2, w3 = draw_words(first_element, sample_id, key_ptr, role, BLOCK)
    if DISTRIBUTION == "normal":
        x0, x1 = box_muller(w0, w1)
        x2, x3 = box_muller(w2, w3)
    else:
        x0, x1, x2, x3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    return in_element_order(x0, x1, x2, x3)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round to nearest even."""
    if TRITON_INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter's own conversion rounds ties away from zero and loses a carry into the exponent.
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def stochastic_round(x, word, DTYPE: tl.constexpr):
    """fp32 to bfloat16 or float16 by the low 16 or 13 bits of `word`; see `reference/rounding.py`."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        rounded = (bits + (word & 0xFFFF).to(tl.int32)) >> 16
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        normal = ((bits + (word & 0x1FFF).to(tl.int32)) & ~0x1FFF).to(tl.float32, bitcast=True)
        steps = tl.abs(x) * (2.0**24)
        floor = tl.floor(steps)
        fraction = (word & 0xFFFF).to(tl.float32) * (2.0**-16)
        subnormal = (floor + (steps - floor > fraction).to(tl.float32)) * (2.0**-24)
        subnormal = tl.where(bits < 0, -subnormal, subnormal)
        result = tl.where(magnitude < SMALLEST_NORMAL_HALF_BITS, subnormal, normal).to(tl.float16)
    return tl.where(magnitude < INFINITY_BITS, result, narrow(x, DTYPE))


@triton.jit
def mask_bits(mask_ptr, offsets, inside):
    """Mask bits of elements, True for those that take part: bit offset % 8 of byte offset // 8."""
    byte = tl.load(mask_ptr + (offsets >> 3), mask=inside, other=0)
    return ((byte >> (offsets & 7).to(tl.uint8)) & 1) != 0


@triton.jit
def load_block(ptr, offsets, inside, MASKED: tl.constexpr):
    # Only an unmasked access is sure to be 16 bytes wide: the end of a list's tensor is not known to be aligned.
    if MASKED:
        return tl.load(ptr + offsets, mask=inside, other=0.0)
    else:
        return tl.load(ptr + offsets)


@triton.jit
def store_block(ptr, offsets, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + offsets, value, mask=inside)
    else:
        tl.store(ptr + offsets, value)
