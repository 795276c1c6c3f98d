#include <torch/csrc/stable/library.h>

#include "../names.h"
#include "noise.h"
#include "squared_error.h"

namespace erasediff::cpu {
namespace {

struct Denoising {
  Flat sample, alpha, sigma;
  Noise noise;
  int64_t numel;
  PredictionType type;

  template <PredictionType type, class T>
  static ERASEDIFF_FN void fill(const T* x, const T* epsilon, T alpha, T sigma, int64_t n, T* target) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) target[i] = denoising_target<type>(x[i], epsilon[i], alpha, sigma);
  }

  template <class T>
  ERASEDIFF_FN const T* target(int64_t index, int64_t first, int64_t n, T* buffer) const {
    if (type == PredictionType::sample) return load(sample, index * numel + first, n, buffer);
    if (type == PredictionType::epsilon) return noise.read(index, numel, first, n, buffer);
    T sample_buffer[kTile];
    const T* x = load(sample, index * numel + first, n, sample_buffer);
    const T* epsilon = noise.read(index, numel, first, n, buffer);
    const T a = T(read_value(alpha, index)), s = T(read_value(sigma, index));
    if (type == PredictionType::v_prediction)
      fill<PredictionType::v_prediction>(x, epsilon, a, s, n, buffer);
    else
      fill<PredictionType::flow_prediction>(x, epsilon, a, s, n, buffer);
    return buffer;
  }
};

std::tuple<Tensor, Tensor> denoising_loss(const Tensor& prediction_any, const Tensor& sample_any, const Tensor& alpha,
                                          const Tensor& sigma, const Tensor& weight,
                                          const std::optional<Tensor>& noise_any,
                                          const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& key,
                                          int64_t role, const std::string& prediction_type) {
  const Tensor prediction = torch::stable::contiguous(prediction_any), sample = torch::stable::contiguous(sample_any);
  const Tensor alphas = torch::stable::contiguous(alpha), sigmas = torch::stable::contiguous(sigma);
  const std::optional<Tensor> given = contiguous(noise_any), ids = contiguous(sample_ids), seed = contiguous(key);
  const Noise noise(given, ids, seed, role, /*gaussian=*/true);
  const int64_t numel = prediction.size(0) ? prediction.numel() / prediction.size(0) : 0;
  const Denoising d{Flat(sample), Flat(alphas), Flat(sigmas), noise, numel, prediction_type_named(prediction_type)};
  return squared_error(
      prediction, weight,
      [&](int64_t index, int64_t first, int64_t n, float* buffer)
          ERASEDIFF_INLINE { return d.target(index, first, n, buffer); },
      [&](int64_t index, int64_t first, int64_t n, double* buffer)
          ERASEDIFF_INLINE { return d.target(index, first, n, buffer); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("denoising_loss", TORCH_BOX(&denoising_loss)); }

}  // namespace erasediff::cpu
