// Matrices whose rows are read where indices say.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "capability.h"
#include "tile.h"

namespace erasediff::cpu {

// Elements that a thread is woken for.
constexpr int64_t kRowsGrain = 1 << 14;

// Shares rows out to the threads; `work` is about how many elements a row goes through.
template <class F>
void for_each_row(int64_t rows, int64_t work, const F& f) {
  const int64_t grain = kRowsGrain / (work > 0 ? work : 1) + 1;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    with_capability([&]() ERASEDIFF_INLINE {
      for (int64_t row = begin; row < end; ++row) f(row);
    });
  });
}

// sum += scale * n values of `matrix`.
template <class T>
ERASEDIFF_FN void add_scaled(T* sum, T scale, const Flat& matrix, int64_t first, int64_t n) {
  T buffer[kTile];
  const T* values = load(matrix, first, n, buffer);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) sum[i] += scale * values[i];
}

inline void check_latents(const int32_t* indices, int64_t count, int64_t latents) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = uint32_t(indices[i]) > largest ? uint32_t(indices[i]) : largest;
  STD_TORCH_CHECK(count == 0 || int64_t(largest) < latents, "an index lies outside of the ", latents,
                  " rows of the weight");
}

}  // namespace erasediff::cpu
