#include <torch/csrc/stable/library.h>

#include "capability.h"
#include "chunks.h"
#include "noise.h"

namespace erasediff::cpu {
namespace {

Tensor philox_bits(const Tensor& sample_ids, const Tensor& key, int64_t role, int64_t words) {
  const Tensor ids = torch::stable::contiguous(sample_ids), contiguous_key = torch::stable::contiguous(key);
  const Streams streams(ids, contiguous_key, role);
  Tensor result = torch::stable::new_empty(ids, {ids.numel(), words});
  int64_t* bits = static_cast<int64_t*>(result.data_ptr());
  const Chunks chunks(ids.numel(), [&](int64_t) { return words; });
  chunks.for_each([&](int64_t, int64_t sample, int64_t first, int64_t size) {
    with_capability([&]() ERASEDIFF_INLINE {
      uint32_t buffer[kTile];
      for (const int64_t end = first + size; first < end; first += kTile) {
        const int64_t n = std::min(kTile, end - first);
        draw_words(streams.of(sample), first, n, buffer);
        for (int64_t i = 0; i < n; ++i) bits[sample * words + first + i] = buffer[i];
      }
    });
  });
  return result;
}

Tensor philox_noise(const Tensor& sample_ids, const Tensor& key, int64_t role, const std::vector<int64_t>& shape,
                    const std::string& distribution, ScalarType dtype) {
  const Tensor ids = torch::stable::contiguous(sample_ids), contiguous_key = torch::stable::contiguous(key);
  const Streams streams(ids, contiguous_key, role);
  std::vector<int64_t> sizes = {ids.numel()};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  Tensor result = torch::stable::new_empty(ids, sizes, dtype);
  const Flat noise(result);
  const int64_t numel = ids.numel() ? result.numel() / ids.numel() : 0;
  const bool gaussian = distribution == "normal";
  const Chunks chunks(ids.numel(), [&](int64_t) { return numel; });
  chunks.for_each([&](int64_t, int64_t sample, int64_t first, int64_t size) {
    with_capability([&]() ERASEDIFF_INLINE {
      float buffer[kTile];
      for (const int64_t end = first + size; first < end; first += kTile) {
        const int64_t n = std::min(kTile, end - first);
        draw(streams.of(sample), gaussian, first, n, buffer);
        store(noise, sample * numel + first, n, buffer);
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) {
  m.impl("philox_bits", TORCH_BOX(&philox_bits));
  m.impl("philox_noise", TORCH_BOX(&philox_noise));
}

}  // namespace erasediff::cpu
