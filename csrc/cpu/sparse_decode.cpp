#include <torch/csrc/stable/library.h>

#include <optional>

#include "rows.h"

namespace erasediff::cpu {
namespace {

template <class T>
ERASEDIFF_FN void decode_row(const Flat& values, const int32_t* indices, const Flat& weight, const Flat& bias,
                             const Flat& decoded, int64_t row, int64_t k, int64_t dim) {
  for (int64_t first = 0; first < dim; first += kTile) {
    const int64_t n = dim - first < kTile ? dim - first : kTile;
    T sum[kTile] = {};
    if (bias.data) {
      T buffer[kTile];
      std::memcpy(sum, load(bias, first, n, buffer), n * sizeof(T));
    }
    for (int64_t j = row * k; j < (row + 1) * k; ++j) {
      T buffer[1];
      add_scaled(sum, *load(values, j, 1, buffer), weight, indices[j] * dim + first, n);
    }
    store(decoded, row * dim + first, n, sum);
  }
}

Tensor sparse_decode(const Tensor& values_any, const Tensor& indices_any, const Tensor& weight_any,
                     const std::optional<Tensor>& bias_any) {
  const Tensor values = torch::stable::contiguous(values_any), indices = torch::stable::contiguous(indices_any);
  const Tensor weight = torch::stable::contiguous(weight_any);
  const std::optional<Tensor> bias =
      bias_any ? std::optional<Tensor>(torch::stable::contiguous(*bias_any)) : std::nullopt;
  const int64_t count = values.size(0), k = values.size(1), dim = weight.size(1);
  const auto* latents = static_cast<const int32_t*>(indices.data_ptr());
  check_latents(latents, count * k, weight.size(0));
  Tensor decoded = torch::stable::new_empty(values, {count, dim});
  const Flat value_flat(values), weight_flat(weight), to(decoded), bias_flat = bias ? Flat(*bias) : Flat();
  for_each_row(count, k * dim, [&](int64_t row) ERASEDIFF_INLINE {
    if (to.dtype == ScalarType::Double)
      decode_row<double>(value_flat, latents, weight_flat, bias_flat, to, row, k, dim);
    else
      decode_row<float>(value_flat, latents, weight_flat, bias_flat, to, row, k, dim);
  });
  return decoded;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace erasediff::cpu
