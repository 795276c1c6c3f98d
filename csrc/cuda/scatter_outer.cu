// One block per latent, which alone writes its row: no atomics, and a fixed order.
#include <torch/csrc/stable/library.h>

#include "samples.cuh"

namespace erasediff::cuda {
namespace {

template <class Stored>
// The least bound on blocks: for a tighter one of its own choice, ptxas spills on sm_80.
__global__ void __launch_bounds__(kThreads, 1)
    scatter_outer_kernel(const Stored* values, const Stored* rows, const int64_t* order, const int64_t* starts,
                         Stored* outer, int64_t k, int64_t dim) {
  using T = Compute<Stored>;
  const int64_t latent = blockIdx.x, begin = starts[latent], end = starts[latent + 1];
  const bool wide = dim % kWide<Stored> == 0 && aligned(rows, outer);
  for_each_element<kWide<Stored>>(0, dim, wide, [&](auto n, int64_t i) {
    T sum[n.value] = {};
#pragma unroll 4
    for (int64_t entry = begin; entry < end; ++entry) {
      const int64_t position = order[entry];
      const T value = widen<T>(values[position]);
      T columns[n.value];
      load(rows + position / k * dim + i, columns);
#pragma unroll
      for (int c = 0; c < n.value; ++c) sum[c] += value * columns[c];
    }
    store_nearest(outer + latent * dim + i, sum);
  });
}

Tensor scatter_outer(const Tensor& values_any, const Tensor& rows_any, const Tensor& order_any,
                     const Tensor& starts_any) {
  const Tensor values = torch::stable::contiguous(values_any), rows = torch::stable::contiguous(rows_any);
  const Tensor order = torch::stable::contiguous(order_any), starts = torch::stable::contiguous(starts_any);
  const int64_t latents = starts.size(0) - 1, dim = rows.size(1);
  Tensor outer = torch::stable::new_empty(rows, {latents, dim});
  const Launcher launch(rows);
  with_dtype(rows.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    launch(scatter_outer_kernel<Stored>, latents, kThreads, static_cast<const Stored*>(values.data_ptr()),
           static_cast<const Stored*>(rows.data_ptr()), static_cast<const int64_t*>(order.data_ptr()),
           static_cast<const int64_t*>(starts.data_ptr()), static_cast<Stored*>(outer.data_ptr()), values.size(1), dim);
  });
  return outer;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_C, ERASEDIFF_DEVICE, m) { m.impl("scatter_outer", TORCH_BOX(&scatter_outer)); }

}  // namespace erasediff::cuda
