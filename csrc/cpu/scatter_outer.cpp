// Latent by latent, and so without two threads that add to the same row.
#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace erasediff::cpu {
namespace {

template <class T>
ERASEDIFF_FN void outer_of_latent(const Flat& values, const Flat& rows, const int64_t* order, int64_t begin,
                                  int64_t end, const Flat& outer, int64_t latent, int64_t k, int64_t dim) {
  for (int64_t first = 0; first < dim; first += kTile) {
    const int64_t n = dim - first < kTile ? dim - first : kTile;
    T sum[kTile] = {};
    for (int64_t entry = begin; entry < end; ++entry) {
      T buffer[1];
      add_scaled(sum, *load(values, order[entry], 1, buffer), rows, order[entry] / k * dim + first, n);
    }
    store(outer, latent * dim + first, n, sum);
  }
}

Tensor scatter_outer(const Tensor& values_any, const Tensor& rows_any, const Tensor& order_any,
                     const Tensor& starts_any) {
  const Tensor values = torch::stable::contiguous(values_any), rows = torch::stable::contiguous(rows_any);
  const Tensor order = torch::stable::contiguous(order_any), starts = torch::stable::contiguous(starts_any);
  const int64_t latents = starts.size(0) - 1, k = values.size(1), dim = rows.size(1);
  const auto* entries = static_cast<const int64_t*>(order.data_ptr());
  const auto* bounds = static_cast<const int64_t*>(starts.data_ptr());
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[latents] == values.numel(), "an index lies outside of the ", latents,
                  " latents");
  Tensor outer = torch::stable::new_empty(rows, {latents, dim});
  const Flat value_flat(values), row_flat(rows), to(outer);
  for_each_row(latents, dim * (values.numel() / latents + 1), [&](int64_t latent) ERASEDIFF_INLINE {
    if (to.dtype == ScalarType::Double)
      outer_of_latent<double>(value_flat, row_flat, entries, bounds[latent], bounds[latent + 1], to, latent, k, dim);
    else
      outer_of_latent<float>(value_flat, row_flat, entries, bounds[latent], bounds[latent + 1], to, latent, k, dim);
  });
  return outer;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("scatter_outer", TORCH_BOX(&scatter_outer)); }

}  // namespace erasediff::cpu
