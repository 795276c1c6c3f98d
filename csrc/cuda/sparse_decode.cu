// One block per row: each thread owns a few columns and goes through the k latents in order.
#include <torch/csrc/stable/library.h>

#include "samples.cuh"

namespace erasediff::cuda {
namespace {

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    sparse_decode_kernel(const Stored* values, const int32_t* indices, const Stored* weight, const Stored* bias,
                         Stored* decoded, int64_t k, int64_t dim) {
  using T = Compute<Stored>;
  const int64_t row = blockIdx.x;
  const bool wide = dim % kWide<Stored> == 0 && aligned(weight, bias, decoded);
  for_each_element<kWide<Stored>>(0, dim, wide, [&](auto n, int64_t i) {
    T sum[n.value] = {};
    if (bias) load(bias + i, sum);
#pragma unroll 4
    for (int64_t j = 0; j < k; ++j) {
      const T value = widen<T>(values[row * k + j]);
      T columns[n.value];
      load(weight + indices[row * k + j] * dim + i, columns);
#pragma unroll
      for (int c = 0; c < n.value; ++c) sum[c] += value * columns[c];
    }
    store_nearest(decoded + row * dim + i, sum);
  });
}

Tensor sparse_decode(const Tensor& values_any, const Tensor& indices_any, const Tensor& weight_any,
                     const std::optional<Tensor>& bias_any) {
  const Tensor values = torch::stable::contiguous(values_any), indices = torch::stable::contiguous(indices_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const std::optional<Tensor> bias = contiguous(bias_any);
  const int64_t count = values.size(0), k = values.size(1), dim = weight.size(1);
  Tensor decoded = torch::stable::new_empty(values, {count, dim});
  const Launcher launch(values);
  with_dtype(values.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    launch(sparse_decode_kernel<Stored>, count, kThreads, static_cast<const Stored*>(values.data_ptr()),
           static_cast<const int32_t*>(indices.data_ptr()), static_cast<const Stored*>(weight.data_ptr()),
           data_of<Stored>(bias), static_cast<Stored*>(decoded.data_ptr()), k, dim);
  });
  return decoded;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
}

}  // namespace erasediff::cuda
