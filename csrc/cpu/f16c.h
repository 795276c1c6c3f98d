// Conversions of float16 by F16C, which every CPU with AVX2 has: a fifth of the instructions of shared/half.h.
#pragma once

#include "../shared/half.h"
#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace erasediff::cpu {

#if defined(__x86_64__)
// Not inlined into code for another instruction set, so a call per tile.
__attribute__((target("avx,f16c"), noinline)) inline void widen_f16c(const fp16* stored, float* values, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored + i))));
  }
  for (; i < n; ++i) values[i] = widen<float>(stored[i]);
}

__attribute__((target("avx,f16c"), noinline)) inline void narrow_f16c(const float* values, fp16* stored, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(stored + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) stored[i] = narrow<fp16>(values[i]);
}

inline bool has_f16c() { return capability() != Capability::baseline; }
#else
inline void widen_f16c(const fp16*, float*, int64_t) {}
inline void narrow_f16c(const float*, fp16*, int64_t) {}
constexpr bool has_f16c() { return false; }
#endif

}  // namespace erasediff::cpu
