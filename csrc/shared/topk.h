// The order of activations in topk_encode: larger values first, then lower indices.
#pragma once

#include <type_traits>

#include "half.h"

namespace erasediff {

ERASEDIFF_FN uint64_t bits_of(double value) {
#if defined(__CUDA_ARCH__)
  return uint64_t(__double_as_longlong(value));
#else
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == sizeof(uint64_t), uint64_t, uint32_t>;

// ReLU(x) as an integer that sorts as it does; NaN above all.
template <class T>
ERASEDIFF_FN Bits<T> activation_bits(T x) {
  if (x != x) return ~Bits<T>(0);
  return x > T(0) ? bits_of(x) : Bits<T>(0);
}

// Bits that are stored for an activation: those of the value itself, without a rounding.
template <class Stored>
ERASEDIFF_FN Stored activation(Stored x) {
  return widen<float>(x) <= 0.0f ? Stored{} : x;
}
template <>
ERASEDIFF_FN double activation(double x) {
  return x <= 0.0 ? 0.0 : x;
}

}  // namespace erasediff
