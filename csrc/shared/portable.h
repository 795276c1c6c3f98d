// Macros and intrinsics by which the element functors are the same code on the host and on the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Everything in shared/ is inlined into its caller, and so is compiled for the caller's instruction set.
#if defined(__CUDACC__)
#define ERASEDIFF_FN __host__ __device__ __forceinline__
#define ERASEDIFF_UNROLL _Pragma("unroll")
#else
#define ERASEDIFF_FN inline __attribute__((always_inline))
#define ERASEDIFF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace erasediff {

ERASEDIFF_FN uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

ERASEDIFF_FN float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

}  // namespace erasediff
