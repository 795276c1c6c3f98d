// bfloat16 and float16 as bits, with conversions free of branches (they vectorise) and of denormal fp32 intermediates
// (they hold under flush-to-zero).
#pragma once

#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace erasediff {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
ERASEDIFF_FN T widen(float value) {
  return T(value);
}
template <class T>
ERASEDIFF_FN T widen(double value) {
  return T(value);
}
template <class T>
ERASEDIFF_FN T widen(bf16 value) {
  return T(float_of(uint32_t(value.bits) << 16));
}
template <class T>
ERASEDIFF_FN T widen(fp16 value) {
#if defined(__CUDA_ARCH__)
  return T(__half2float(__ushort_as_half(value.bits)));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);
  // Subnormal halves: place the digits under an implicit one, then take that one away.
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return T(float_of(sign | (magnitude >= (31u << 23) ? special : finite)));
#endif
}

// Rounds to nearest, ties to even. NaN stays NaN.
template <class Stored, class T>
struct Narrow {
  static ERASEDIFF_FN Stored from(T value) { return Stored(value); }
};
template <class T>
struct Narrow<bf16, T> {
  static ERASEDIFF_FN bf16 from(T value) {
    const uint32_t bits = bits_of(float(value));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {uint16_t(nan ? 0x7fc0u : rounded)};
  }
};
template <class T>
struct Narrow<fp16, T> {
  static ERASEDIFF_FN fp16 from(T value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(float(value)))};
#else
    const uint32_t bits = bits_of(float(value));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 adding 1/2 makes the fp32 adder round at the last digit of a subnormal half.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {uint16_t(sign | (magnitude >= 0x477ff000u ? infinite : finite))};
#endif
  }
};

template <class Stored, class T>
ERASEDIFF_FN Stored narrow(T value) {
  return Narrow<Stored, T>::from(value);
}

// Rounds fp32 up or down at random, up with the probability of the fraction that is cut off.
template <class Stored>
struct Stochastic {
  static ERASEDIFF_FN Stored from(float value, uint32_t) { return Stored(value); }
};
template <>
struct Stochastic<bf16> {
  static ERASEDIFF_FN bf16 from(float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
    const bool special = (bits & 0x7f800000u) == 0x7f800000u;
    return {special ? narrow<bf16>(value).bits : uint16_t(rounded)};
  }
};
template <>
struct Stochastic<fp16> {
  static ERASEDIFF_FN fp16 from(float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t magnitude = bits ^ sign;
    const uint32_t normal = (magnitude + (random & 0x1fffu)) & ~0x1fffu;
    // The gap is constant below 2^-14, so the 13 cut-off bits are no longer the fraction.
    const float small = magnitude < (113u << 23) ? float_of(magnitude) : 0.0f;
    const float steps = small * 16777216.0f;
    const float floor = float(int32_t(steps));
    const bool up = steps - floor > float(int32_t(random & 0xffffu)) * (1.0f / 65536.0f);
    const uint32_t subnormal = bits_of((up ? floor + 1.0f : floor) * (1.0f / 16777216.0f));
    const uint32_t rounded = magnitude < (113u << 23) ? subnormal : normal;
    return narrow<fp16>(float_of(sign | (magnitude < 0x7f800000u ? rounded : magnitude)));
  }
};

}  // namespace erasediff
