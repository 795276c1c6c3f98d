// sum_b weight_b mean_e (prediction - target)^2 and its gradient in one pass, for any target.
#pragma once

#include <tuple>

#include "capability.h"
#include "chunks.h"
#include "products.h"
#include "tile.h"

namespace erasediff::cpu {

// `find_target(T(), sample, first, n, buffer)` is the target of elements first .. first + n - 1 of a sample, as T.
template <class T, class FindTarget>
void squared_error_of_chunk(const Flat& prediction, const Flat& grad, T coefficient, const FindTarget& find_target,
                            int64_t sample, int64_t numel, int64_t first, int64_t size, Products& products) {
  T prediction_buffer[kTile], target_buffer[kTile], grad_buffer[kTile], error[kTile];
  for (const int64_t end = first + size; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    const int64_t offset = sample * numel + first;
    with_capability([&]() ERASEDIFF_INLINE {
      const T* p = load(prediction, offset, n, prediction_buffer);
      const T* t = find_target(sample, first, n, target_buffer);
      T* g = target(grad, offset, grad_buffer);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        error[i] = p[i] - t[i];
        g[i] = error[i] * coefficient;
      }
      store(grad, offset, n, g);
    });
    add_products(error, error, n, products);
  }
}

// `find_float` and `find_double` are find_target for the two types of arithmetic.
template <class FindFloat, class FindDouble>
std::tuple<Tensor, Tensor> squared_error(const Tensor& prediction, const Tensor& weight, const FindFloat& find_float,
                                         const FindDouble& find_double) {
  const Tensor weights = torch::stable::contiguous(weight);
  const Flat weight_flat(weights), from(prediction);
  const bool wide = from.dtype == ScalarType::Double;
  Tensor grad = torch::stable::new_empty(prediction, prediction.sizes());
  Tensor loss = torch::stable::new_empty(prediction, {}, wide ? ScalarType::Double : ScalarType::Float);
  const Flat to(grad), loss_flat(loss);
  const int64_t batch = prediction.size(0), numel = batch ? prediction.numel() / batch : 0;
  const Chunks chunks(batch, [&](int64_t) { return numel; });
  std::vector<double> losses(chunks.count());
  chunks.for_each([&](int64_t chunk, int64_t sample, int64_t first, int64_t size) {
    Products products;
    const double w = read_value(weight_flat, sample);
    if (wide) {
      squared_error_of_chunk(from, to, 2.0 * w / double(numel), find_double, sample, numel, first, size, products);
    } else {
      squared_error_of_chunk(from, to, 2.0f * float(w) / float(numel), find_float, sample, numel, first, size,
                             products);
    }
    losses[chunk] = Products::sum(products.xx) * (w / double(numel));
  });
  double total = 0.0;
  for (const double part : losses) total += part;
  if (wide)
    *loss_flat.at<double>(0) = total;
  else
    *loss_flat.at<float>(0) = float(total);
  return {loss, grad};
}

}  // namespace erasediff::cpu
