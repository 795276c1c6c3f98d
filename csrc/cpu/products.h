// Sums of products in fp64 over a number of lanes that does not depend on the instruction set, so neither do their
// bits.
//
// Compilers do not vectorise this reduction well (GCC 12 leaves half of the lanes scalar), hence the intrinsics. They
// must be compiled for their instruction set in the first place; inlining comes too late for vector types.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../shared/half.h"
#include "capability.h"

namespace erasediff::cpu {

constexpr int kLanes = 16;

// Lane l holds the sums over the elements i with i % kLanes == l.
struct Products {
  double xx[kLanes] = {}, xy[kLanes] = {}, yy[kLanes] = {};

  static double sum(const double (&lanes)[kLanes]) {
    double total = 0.0;
    for (const double lane : lanes) total += lane;
    return total;
  }
};

namespace baseline {

using Doubles = double;
template <class T>
ERASEDIFF_FN double read(const T* value) {
  return widen<double>(*value);
}
#include "products.inc"

}  // namespace baseline

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace avx2 {

using Doubles = __m256d;
inline Doubles read(const double* values) { return _mm256_loadu_pd(values); }
inline Doubles read(const float* values) { return _mm256_cvtps_pd(_mm_loadu_ps(values)); }
inline Doubles read(const bf16* values) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}
inline Doubles read(const fp16* values) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
}
#include "products.inc"

}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {

using Doubles = __m512d;
inline Doubles read(const double* values) { return _mm512_loadu_pd(values); }
inline Doubles read(const float* values) { return _mm512_cvtps_pd(_mm256_loadu_ps(values)); }
inline Doubles read(const bf16* values) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
inline Doubles read(const fp16* values) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
}
#include "products.inc"

}  // namespace avx512
#pragma GCC pop_options

#endif

// Adds the products of x and y, n values each, to the sums.
template <class T>
void add_products(const T* x, const T* y, int64_t n, Products& products) {
  const auto add = [&](const T* x, const T* y, int64_t blocks) {
#if defined(__x86_64__)
    if (capability() == Capability::avx512) return avx512::add_products(x, y, blocks, products);
    if (capability() == Capability::avx2) return avx2::add_products(x, y, blocks, products);
#endif
    baseline::add_products(x, y, blocks, products);
  };
  const int64_t blocks = n / kLanes, rest = n % kLanes;
  add(x, y, blocks);
  if (rest == 0) return;
  T x_rest[kLanes] = {}, y_rest[kLanes] = {};
  std::memcpy(x_rest, x + blocks * kLanes, rest * sizeof(T));
  std::memcpy(y_rest, y + blocks * kLanes, rest * sizeof(T));
  add(x_rest, y_rest, 1);
}

}  // namespace erasediff::cpu
