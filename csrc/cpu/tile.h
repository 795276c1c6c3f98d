// Arithmetic is done on tiles of fp32 (or fp64) values. A tensor that holds them lends its own memory; one of another
// type is converted through a buffer that stays in the first-level cache. So each loop is written once, for one type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../shared/half.h"
#include "../shared/portable.h"
#include "f16c.h"

namespace erasediff::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Short turns between five streams suit the prefetchers: the update is a quarter faster than with 1024.
constexpr int64_t kTile = 256;

// A tensor as flat storage; null data means that there is none.
struct Flat {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  Flat() = default;
  explicit Flat(const Tensor& tensor) : data(static_cast<char*>(tensor.data_ptr())), dtype(tensor.scalar_type()) {}

  template <class Stored>
  ERASEDIFF_FN Stored* at(int64_t index) const {
    return reinterpret_cast<Stored*>(data) + index;
  }
};

template <class T>
constexpr ScalarType kDtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

template <class T, class Stored>
ERASEDIFF_FN void widen_tile(const Stored* stored, T* values, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) values[i] = widen<T>(stored[i]);
}

template <class T, class Stored>
ERASEDIFF_FN void narrow_tile(const T* values, Stored* stored, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) stored[i] = narrow<Stored>(values[i]);
}

ERASEDIFF_FN void widen_tile(const fp16* stored, float* values, int64_t n) {
  has_f16c() ? widen_f16c(stored, values, n) : widen_tile<float, fp16>(stored, values, n);
}

ERASEDIFF_FN void narrow_tile(const float* values, fp16* stored, int64_t n) {
  has_f16c() ? narrow_f16c(values, stored, n) : narrow_tile<float, fp16>(values, stored, n);
}

// Values first .. first + n - 1 of a tensor: in place where its type is T, else read into `buffer`.
template <class T>
ERASEDIFF_FN T* load(const Flat& flat, int64_t first, int64_t n, T* buffer) {
  if (flat.dtype == kDtype<T>) return flat.at<T>(first);
  if (flat.dtype == ScalarType::BFloat16) widen_tile(flat.at<bf16>(first), buffer, n);
  if (flat.dtype == ScalarType::Half) widen_tile(flat.at<fp16>(first), buffer, n);
  if (flat.dtype == ScalarType::Float) widen_tile(flat.at<float>(first), buffer, n);
  if (flat.dtype == ScalarType::Double) widen_tile(flat.at<double>(first), buffer, n);
  return buffer;
}

// Writes what `load` handed out back to the tensor, rounded to nearest; nothing to do where it was in place.
template <class T>
ERASEDIFF_FN void store(const Flat& flat, int64_t first, int64_t n, const T* values) {
  if (flat.dtype == ScalarType::BFloat16) narrow_tile(values, flat.at<bf16>(first), n);
  if (flat.dtype == ScalarType::Half) narrow_tile(values, flat.at<fp16>(first), n);
  if (flat.dtype == ScalarType::Float && values != static_cast<const void*>(flat.at<float>(first)))
    narrow_tile(values, flat.at<float>(first), n);
  if (flat.dtype == ScalarType::Double && values != static_cast<const void*>(flat.at<double>(first)))
    narrow_tile(values, flat.at<double>(first), n);
}

// One value of any type.
inline double read_value(const Flat& flat, int64_t index) {
  double buffer;
  return *load(flat, index, 1, &buffer);
}

// Buffer for the values of a tensor that is only written, to be filled before `store`.
template <class T>
ERASEDIFF_FN T* target(const Flat& flat, int64_t first, T* buffer) {
  return flat.dtype == kDtype<T> ? flat.at<T>(first) : buffer;
}

// keep ? a : b for keep = 0 or 1, in integer arithmetic: a conditional that feeds a store keeps GCC from vectorising.
template <class T>
ERASEDIFF_FN T select(uint8_t keep, T a, T b) {
  using Bits = std::conditional_t<sizeof(T) == sizeof(uint64_t), uint64_t, uint32_t>;
  Bits a_bits, b_bits;
  std::memcpy(&a_bits, &a, sizeof a);
  std::memcpy(&b_bits, &b, sizeof b);
  const Bits ones = Bits(0) - Bits(keep);
  const Bits bits = (a_bits & ones) | (b_bits & ~ones);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// keep[i] = bit i of a packed mask, for elements first .. first + n - 1; `first` is a multiple of 8.
ERASEDIFF_FN void unpack_mask(const uint8_t* mask, int64_t first, int64_t n, uint8_t* keep) {
  const uint8_t* bytes = mask + first / 8;
#pragma GCC ivdep
  for (int64_t i = 0; i < (n + 7) / 8; ++i) {
    // Eight copies of the byte, one bit of each kept, then moved down to bit 0.
    const uint64_t bits = bytes[i] * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t ones = (bits + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    std::memcpy(keep + 8 * i, &ones, 8);
  }
}

}  // namespace erasediff::cpu
