#include <torch/csrc/stable/library.h>

#include <vector>

#include "rows.h"

namespace erasediff::cpu {
namespace {

// Partial sums of a product, added up by halves: the same order for every instruction set.
constexpr int64_t kLanes = 64;

template <class T>
ERASEDIFF_FN T dot(const T* row, const Flat& weight, int64_t offset, int64_t dim) {
  T lanes[kLanes] = {};
  for (int64_t first = 0; first < dim; first += kTile) {
    const int64_t n = dim - first < kTile ? dim - first : kTile;
    T buffer[kTile];
    const T* values = load(weight, offset + first, n, buffer);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma GCC ivdep
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += row[first + i + lane] * values[i + lane];
    }
    for (int64_t lane = 0; i + lane < n; ++lane) lanes[lane] += row[first + i + lane] * values[i + lane];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class T>
ERASEDIFF_FN void dots_of_row(const Flat& rows, const int32_t* indices, const Flat& weight, const Flat& dots,
                              int64_t row, int64_t k, int64_t dim, T* buffer) {
  const T* values = load(rows, row * dim, dim, buffer);
  for (int64_t j = row * k; j < (row + 1) * k; ++j) {
    const T product = dot(values, weight, indices[j] * dim, dim);
    store(dots, j, 1, &product);
  }
}

Tensor gather_dot(const Tensor& rows_any, const Tensor& indices_any, const Tensor& weight_any) {
  const Tensor rows = torch::stable::contiguous(rows_any), indices = torch::stable::contiguous(indices_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const int64_t count = indices.size(0), k = indices.size(1), dim = weight.size(1);
  const auto* latents = static_cast<const int32_t*>(indices.data_ptr());
  check_latents(latents, count * k, weight.size(0));
  Tensor dots = torch::stable::new_empty(rows, {count, k});
  const Flat row_flat(rows), weight_flat(weight), to(dots);
  const bool wide = to.dtype == ScalarType::Double;
  for_each_row(count, k * dim, [&](int64_t row) ERASEDIFF_INLINE {
    thread_local std::vector<double> buffer;
    if (int64_t(buffer.size()) < dim) buffer.resize(dim);
    if (wide)
      dots_of_row<double>(row_flat, latents, weight_flat, to, row, k, dim, buffer.data());
    else
      dots_of_row<float>(row_flat, latents, weight_flat, to, row, k, dim, reinterpret_cast<float*>(buffer.data()));
  });
  return dots;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("gather_dot", TORCH_BOX(&gather_dot)); }

}  // namespace erasediff::cpu
