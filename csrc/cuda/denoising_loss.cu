#include <torch/csrc/stable/library.h>

#include "../names.h"
#include "squared_error.cuh"

namespace erasediff::cuda {
namespace {

template <class Stored>
struct DenoisingTarget {
  using T = Compute<Stored>;

  PredictionType type;
  const Stored* sample;
  const T *alpha, *sigma;
  Noise<Stored> noise;

  __device__ __forceinline__ bool allows_wide(int64_t offset) const {
    return aligned(sample + offset, noise.given ? noise.given + offset : nullptr);
  }

  template <int n>
  __device__ __forceinline__ void operator()(int64_t index, int64_t numel, int64_t i, T (&target)[n]) const {
    if (type == PredictionType::sample) return load(sample + index * numel + i, target);
    noise.read(index, numel, i, target);
    if (type == PredictionType::epsilon) return;
    T x[n];
    load(sample + index * numel + i, x);
    const T a = alpha[index], s = sigma[index];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      target[k] = type == PredictionType::v_prediction
                      ? denoising_target<PredictionType::v_prediction>(x[k], target[k], a, s)
                      : denoising_target<PredictionType::flow_prediction>(x[k], target[k], a, s);
    }
  }
};

std::tuple<Tensor, Tensor> denoising_loss(const Tensor& prediction_any, const Tensor& sample_any, const Tensor& alpha,
                                          const Tensor& sigma, const Tensor& weight,
                                          const std::optional<Tensor>& noise_any,
                                          const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& key,
                                          int64_t role, const std::string& prediction_type) {
  const Tensor prediction = torch::stable::contiguous(prediction_any);
  const Tensor sample = *contiguous_like(sample_any, prediction);
  const Tensor alphas = torch::stable::contiguous(alpha), sigmas = torch::stable::contiguous(sigma);
  const std::optional<Tensor> given = contiguous_like(noise_any, prediction);
  const std::optional<Tensor> ids = contiguous(sample_ids), seed = contiguous(key);
  return squared_error(prediction, weight, [&](auto stored) {
    using Stored = decltype(stored);
    using T = Compute<Stored>;
    return DenoisingTarget<Stored>{prediction_type_named(prediction_type),
                                   static_cast<const Stored*>(sample.data_ptr()),
                                   static_cast<const T*>(alphas.data_ptr()),
                                   static_cast<const T*>(sigmas.data_ptr()),
                                   {data_of<Stored>(given), make_streams(ids, seed, role), /*gaussian=*/true}};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
}

}  // namespace erasediff::cuda
