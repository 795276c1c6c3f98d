#include <torch/csrc/stable/library.h>

#include "capability.h"
#include "chunks.h"
#include "noise.h"

namespace erasediff::cpu {
namespace {

template <class T>
ERASEDIFF_FN void add_noise_to_chunk(const Flat& result, const Flat& sample, const Noise& noise, T alpha, T sigma,
                                     int64_t index, int64_t numel, int64_t first, int64_t size) {
  T sample_buffer[kTile], noise_buffer[kTile], result_buffer[kTile];
  for (const int64_t end = first + size; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    const int64_t offset = index * numel + first;
    const T* x = load(sample, offset, n, sample_buffer);
    const T* epsilon = noise.read(index, numel, first, n, noise_buffer);
    T* noised = target(result, offset, result_buffer);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) noised[i] = alpha * x[i] + sigma * epsilon[i];
    store(result, offset, n, noised);
  }
}

Tensor add_noise(const Tensor& sample_any, const Tensor& alpha, const Tensor& sigma,
                 const std::optional<Tensor>& noise_any, const std::optional<Tensor>& sample_ids,
                 const std::optional<Tensor>& key, int64_t role) {
  const Tensor sample = torch::stable::contiguous(sample_any);
  const std::optional<Tensor> given = contiguous(noise_any), ids = contiguous(sample_ids), seed = contiguous(key);
  const Tensor alphas = torch::stable::contiguous(alpha), sigmas = torch::stable::contiguous(sigma);
  Tensor result = torch::stable::new_empty(sample, sample.sizes());
  const Noise noise(given, ids, seed, role, /*gaussian=*/true);
  const Flat from(sample), to(result), alpha_flat(alphas), sigma_flat(sigmas);
  const int64_t batch = sample.size(0), numel = batch ? sample.numel() / batch : 0;
  const Chunks chunks(batch, [&](int64_t) { return numel; });
  chunks.for_each([&](int64_t, int64_t index, int64_t first, int64_t size) {
    with_capability([&]() ERASEDIFF_INLINE {
      if (from.dtype == ScalarType::Double) {
        add_noise_to_chunk<double>(to, from, noise, read_value(alpha_flat, index), read_value(sigma_flat, index), index,
                                   numel, first, size);
      } else {
        add_noise_to_chunk<float>(to, from, noise, float(read_value(alpha_flat, index)),
                                  float(read_value(sigma_flat, index)), index, numel, first, size);
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("add_noise", TORCH_BOX(&add_noise)); }

}  // namespace erasediff::cpu
