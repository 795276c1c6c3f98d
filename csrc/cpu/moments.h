// Moments of the update as tiles of values, whether they are stored as floats or as codes of 8 bits.
#pragma once

#include "../shared/moment_codes.h"
#include "tile.h"

namespace erasediff::cpu {

static_assert(kTile == kMomentBlock, "a tile is a block of codes");

// One moment of one tensor; `absmax` has a value for each block of codes, and is null where floats are stored.
struct Moment : Flat {
  float* absmax = nullptr;

  Moment() = default;
  Moment(const Tensor& stored, const Tensor* absmax)
      : Flat(stored), absmax(absmax ? static_cast<float*>(absmax->data_ptr()) : nullptr) {}
};

template <class Code, class T>
ERASEDIFF_FN void decode_tile(const Moment& moment, int64_t first, int64_t n, T* values) {
  const auto* codes = moment.at<typename Code::Stored>(first);
  const float absmax = moment.absmax[first / kMomentBlock];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) values[i] = T(Code::decode(codes[i], absmax));
}

template <class Code, class T>
ERASEDIFF_FN void encode_tile(const Moment& moment, int64_t first, int64_t n, Dither dither, const T* values) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = larger_bits(largest, magnitude_bits(float(values[i])));
  const float absmax = float_of(largest), inverse = inverse_of(absmax);
  moment.absmax[first / kMomentBlock] = absmax;
  auto* codes = moment.at<typename Code::Stored>(first);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = Code::encode(float(values[i]), inverse, dither(uint32_t(first) + uint32_t(i)));
  }
}

// As `load` and `store` of tile.h; `first` is a multiple of kTile.
template <class T>
ERASEDIFF_FN T* load_moment(const Moment& moment, int64_t first, int64_t n, T* buffer) {
  if (!moment.absmax) return load(moment, first, n, buffer);
  if (moment.dtype == ScalarType::Char)
    decode_tile<SignedCode>(moment, first, n, buffer);
  else
    decode_tile<UnsignedCode>(moment, first, n, buffer);
  return buffer;
}

template <class T>
ERASEDIFF_FN void store_moment(const Moment& moment, int64_t first, int64_t n, Dither dither, const T* values) {
  if (!moment.absmax)
    store(moment, first, n, values);
  else if (moment.dtype == ScalarType::Char)
    encode_tile<SignedCode>(moment, first, n, dither, values);
  else
    encode_tile<UnsignedCode>(moment, first, n, dither, values);
}

}  // namespace erasediff::cpu
