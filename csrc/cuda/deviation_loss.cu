#include <torch/csrc/stable/library.h>

#include "squared_error.cuh"

namespace erasediff::cuda {
namespace {

template <class Stored>
struct DeviationTarget {
  Noise<Stored> noise;

  __device__ __forceinline__ bool allows_wide(int64_t offset) const {
    return aligned(noise.given ? noise.given + offset : nullptr);
  }
  template <int n, class T>
  __device__ __forceinline__ void operator()(int64_t sample, int64_t numel, int64_t i, T (&target)[n]) const {
    noise.read(sample, numel, i, target);
  }
};

std::tuple<Tensor, Tensor> deviation_loss(const Tensor& prediction_any, const Tensor& weight,
                                          const std::optional<Tensor>& target, const std::optional<Tensor>& sample_ids,
                                          const std::optional<Tensor>& key, int64_t role,
                                          const std::string& distribution) {
  const Tensor prediction = torch::stable::contiguous(prediction_any);
  const std::optional<Tensor> given = contiguous_like(target, prediction);
  const std::optional<Tensor> ids = contiguous(sample_ids), seed = contiguous(key);
  return squared_error(prediction, weight, [&](auto stored) {
    using Stored = decltype(stored);
    return DeviationTarget<Stored>{{data_of<Stored>(given), make_streams(ids, seed, role), distribution == "normal"}};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("deviation_loss", TORCH_BOX(&deviation_loss));
}

}  // namespace erasediff::cuda
