# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Moments of 8 bits, with the bits of `reference/moment_codes.py`: launch with enable_fp_fusion=False."""

import triton
import triton.language as tl

from erasediff_kernels.reference import moment_codes

CODES = tl.constexpr(moment_codes.BLOCK)
SMALLEST_NORMAL = tl.constexpr(moment_codes.SMALLEST_NORMAL)
DITHER_OF_STEP = tl.constexpr(moment_codes.DITHER_OF_STEP)
DITHER_OF_ELEMENT = tl.constexpr(moment_codes.DITHER_OF_ELEMENT)


@triton.jit
def decode_signed(codes, absmax):
    root = codes.to(tl.float32) * (1.0 / 127.0)
    return root * tl.abs(root) * absmax


@triton.jit
def decode_unsigned(codes, absmax):
    root = codes.to(tl.float32) * (1.0 / 255.0)
    square = root * root
    return square * square * absmax


@triton.jit
def load_absmax(absmax_ptr, offsets, inside):
    """The absmax of each element's block."""
    return tl.load(absmax_ptr + offsets // CODES, mask=inside, other=0.0)


@triton.jit
def scale_blocks(values, absmax_ptr, start, end, BLOCK: tl.constexpr):
    """Store the absmax of the blocks; for each element what it is multiplied with before a root."""
    BLOCKS: tl.constexpr = BLOCK // CODES
    # As integers, magnitudes are in order and NaN is above all.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(tl.reshape(bits, [BLOCKS, CODES]), axis=1).to(tl.float32, bitcast=True)
    first = start + tl.arange(0, BLOCKS) * CODES
    tl.store(absmax_ptr + first // CODES, absmax, mask=first < end)
    small = absmax < SMALLEST_NORMAL
    inverse = tl.where(small, 0.0, tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), tl.where(small, 1.0, absmax)))
    return tl.reshape(tl.broadcast_to(inverse[:, None], [BLOCKS, CODES]), [BLOCK])


@triton.jit
def at_most_one(root):
    return tl.where(root < 1.0, root, 1.0)


@triton.jit
def dither(step, offsets):
    word = step.to(tl.int64).to(tl.uint32) * DITHER_OF_STEP + offsets.to(tl.uint32) * DITHER_OF_ELEMENT
    return (word >> 16).to(tl.int32).to(tl.float32) * (2.0**-16)


@triton.jit
def encode_signed(values, inverse):
    magnitude = (127.0 * at_most_one(tl.sqrt_rn(tl.abs(values) * inverse)) + 0.5).to(tl.int32)
    return tl.where(values < 0.0, -magnitude, magnitude).to(tl.int8)


@triton.jit
def encode_unsigned(values, inverse, step, offsets):
    root = at_most_one(tl.sqrt_rn(tl.sqrt_rn(values * inverse)))
    magnitude = (255.0 * root + dither(step, offsets)).to(tl.int32)
    return tl.maximum(magnitude, (values > 0.0).to(tl.int32)).to(tl.uint8)
