// One block per row, one warp per product.
#include <torch/csrc/stable/library.h>

#include "samples.cuh"

namespace erasediff::cuda {
namespace {

constexpr int kWarp = 32;

template <int n, class Stored, class T>
__device__ __forceinline__ void add_products(const Stored* row, const Stored* weight, int64_t i, T& sum) {
  T x[n], y[n];
  load(row + i, x);
  load(weight + i, y);
#pragma unroll
  for (int c = 0; c < n; ++c) sum += x[c] * y[c];
}

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    gather_dot_kernel(const Stored* rows, const int32_t* indices, const Stored* weight, Stored* dots, int64_t k,
                      int64_t dim) {
  using T = Compute<Stored>;
  constexpr int n = kWide<Stored>;
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % kWarp;
  const int64_t wide_end = dim % n == 0 && aligned(rows, weight) ? dim : 0;
  for (int64_t j = threadIdx.x / kWarp; j < k; j += kThreads / kWarp) {
    const Stored* latent = weight + indices[row * k + j] * dim;
    T sum = 0;
    for (int64_t i = lane * n; i < wide_end; i += kWarp * n) add_products<n>(rows + row * dim, latent, i, sum);
    for (int64_t i = wide_end + lane; i < dim; i += kWarp) add_products<1>(rows + row * dim, latent, i, sum);
    double total = sum;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
    if (lane == 0) dots[row * k + j] = narrow<Stored>(T(total));
  }
}

Tensor gather_dot(const Tensor& rows_any, const Tensor& indices_any, const Tensor& weight_any) {
  const Tensor rows = torch::stable::contiguous(rows_any), indices = torch::stable::contiguous(indices_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const int64_t count = indices.size(0), k = indices.size(1), dim = weight.size(1);
  Tensor dots = torch::stable::new_empty(rows, {count, k});
  const Launcher launch(rows);
  with_dtype(rows.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    launch(gather_dot_kernel<Stored>, count, kThreads, static_cast<const Stored*>(rows.data_ptr()),
           static_cast<const int32_t*>(indices.data_ptr()), static_cast<const Stored*>(weight.data_ptr()),
           static_cast<Stored*>(dots.data_ptr()), k, dim);
  });
  return dots;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) { m.impl("gather_dot", TORCH_BOX(&gather_dot)); }

}  // namespace erasediff::cuda
