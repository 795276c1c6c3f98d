// Moments of 8 bits (block-wise, as arXiv 2110.02861, with codes that need no table): kernels/README.md, "8-bit moments".
#pragma once

#include "portable.h"

namespace erasediff {

// Elements that share one absmax.
constexpr int64_t kMomentBlock = 256;

// The larger of two numbers >= 0, as bits: NaN above all, and any order of comparisons gives the same bits.
ERASEDIFF_FN uint32_t larger_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }

ERASEDIFF_FN uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// Factor of values before a root; 0 where the reciprocal would overflow.
ERASEDIFF_FN float inverse_of(float absmax) { return absmax < 1.17549435e-38f ? 0.0f : 1.0f / absmax; }

// At most 1, also for what NaN or infinity among the values left.
ERASEDIFF_FN float at_most_one(float root) { return root < 1.0f ? root : 1.0f; }

// In [0, 1), 16 bits: along the steps of one element, and along the elements of one step, equally spread.
struct Dither {
  uint32_t start;

  static ERASEDIFF_FN Dither at(float step) { return {uint32_t(step) * 0x9e3779b1u}; }
  ERASEDIFF_FN float operator()(uint32_t element) const {
    return float(int32_t((start + element * 0x85ebca6bu) >> 16)) * (1.0f / 65536.0f);
  }
};

// m: the signed square root of m / absmax in steps of 1 / 127, to nearest.
struct SignedCode {
  using Stored = int8_t;

  static ERASEDIFF_FN float decode(int8_t code, float absmax) {
    const float root = float(code) * (1.0f / 127.0f);
    return root * fabsf(root) * absmax;
  }
  static ERASEDIFF_FN int8_t encode(float value, float inverse, float) {
    const float root = at_most_one(sqrtf(fabsf(value) * inverse));
    const int32_t magnitude = int32_t(127.0f * root + 0.5f);
    return int8_t(value < 0.0f ? -magnitude : magnitude);
  }
};

// v: the fourth root of v / absmax in steps of 1 / 255, up or down by the dither, and never down to 0.
struct UnsignedCode {
  using Stored = uint8_t;

  static ERASEDIFF_FN float decode(uint8_t code, float absmax) {
    const float root = float(code) * (1.0f / 255.0f);
    return (root * root) * (root * root) * absmax;
  }
  static ERASEDIFF_FN uint8_t encode(float value, float inverse, float dither) {
    const float root = at_most_one(sqrtf(sqrtf(value * inverse)));
    const int32_t magnitude = int32_t(255.0f * root + dither);
    return uint8_t(magnitude > int32_t(value > 0.0f) ? magnitude : int32_t(value > 0.0f));
  }
};

}  // namespace erasediff
