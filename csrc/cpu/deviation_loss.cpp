#include <torch/csrc/stable/library.h>

#include "noise.h"
#include "squared_error.h"

namespace erasediff::cpu {
namespace {

std::tuple<Tensor, Tensor> deviation_loss(const Tensor& prediction_any, const Tensor& weight,
                                          const std::optional<Tensor>& target, const std::optional<Tensor>& sample_ids,
                                          const std::optional<Tensor>& key, int64_t role,
                                          const std::string& distribution) {
  const Tensor prediction = torch::stable::contiguous(prediction_any);
  const std::optional<Tensor> given = contiguous(target), ids = contiguous(sample_ids), seed = contiguous(key);
  const Noise noise(given, ids, seed, role, distribution == "normal");
  const int64_t numel = prediction.size(0) ? prediction.numel() / prediction.size(0) : 0;
  return squared_error(
      prediction, weight,
      [&](int64_t sample, int64_t first, int64_t n, float* buffer)
          ERASEDIFF_INLINE { return noise.read(sample, numel, first, n, buffer); },
      [&](int64_t sample, int64_t first, int64_t n, double* buffer)
          ERASEDIFF_INLINE { return noise.read(sample, numel, first, n, buffer); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("deviation_loss", TORCH_BOX(&deviation_loss)); }

}  // namespace erasediff::cpu
