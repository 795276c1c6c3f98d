// One build for every x86-64: the hot loops are compiled three times and the CPU decides once, at run time.
//
// FMA contraction is off and reductions have a fixed number of lanes, so that all three give the same bits.
#pragma once

#include <cstdlib>
#include <cstring>

namespace erasediff::cpu {

enum class Capability { baseline, avx2, avx512 };

// The best that both this CPU and ATen's own variable ATEN_CPU_CAPABILITY (default | avx2 | avx512) allow.
inline Capability capability() {
  static const Capability chosen = [] {
#if defined(__x86_64__)
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const auto limited_to = [limit](const char* name) { return limit && std::strcmp(limit, name) == 0; };
    if (limited_to("default")) return Capability::baseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && !limited_to("avx2")) return Capability::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
    return Capability::baseline;
  }();
  return chosen;
}

#define ERASEDIFF_INLINE __attribute__((always_inline))

#if defined(__x86_64__)
template <class F>
__attribute__((target("avx2,fma,f16c,bmi,bmi2"))) void call_avx2(const F& f) {
  f();
}
template <class F>
__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))) void call_avx512(const F& f) {
  f();
}
#endif

// Calls f(), a lambda marked ERASEDIFF_INLINE, compiled for the instruction set of this CPU. Whatever f calls
// has to be inlined as well, or it stays baseline code.
template <class F>
void with_capability(const F& f) {
#if defined(__x86_64__)
  if (capability() == Capability::avx512) return call_avx512(f);
  if (capability() == Capability::avx2) return call_avx2(f);
#endif
  f();
}

}  // namespace erasediff::cpu
