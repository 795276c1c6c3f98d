#include <torch/csrc/stable/library.h>

#include "samples.cuh"

namespace erasediff::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) philox_bits_kernel(Samples samples, Streams streams, int64_t* bits) {
  const Samples::Piece piece = samples.piece();
  const Philox philox = streams.of(piece.sample);
  for (int64_t i = piece.first + threadIdx.x; i < piece.end; i += kThreads) {
    bits[piece.sample * samples.numel + i] = philox.block(uint32_t(i / 4)).at(i);
  }
}

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    philox_noise_kernel(Samples samples, Streams streams, bool gaussian, Stored* noise) {
  const Samples::Piece piece = samples.piece();
  const Philox philox = streams.of(piece.sample);
  Stored* const sample = noise + piece.sample * samples.numel;
  for_each_element<kWide<Stored>>(piece.first, piece.end, aligned(sample), [&](auto n, int64_t i) {
    float drawn[n.value];
    draw(philox, gaussian, i, drawn);
    store_nearest(sample + i, drawn);
  });
}

Tensor philox_bits(const Tensor& sample_ids, const Tensor& key, int64_t role, int64_t words) {
  const Launcher launch(sample_ids);
  const std::optional<Tensor> ids = contiguous(sample_ids), seed = contiguous(key);
  Tensor result = torch::stable::new_empty(sample_ids, {sample_ids.numel(), words}, ScalarType::Long);
  const Samples samples(sample_ids.numel(), words);
  launch(philox_bits_kernel, samples.blocks(), kThreads, samples, make_streams(ids, seed, role),
         static_cast<int64_t*>(result.data_ptr()));
  return result;
}

Tensor philox_noise(const Tensor& sample_ids, const Tensor& key, int64_t role, const std::vector<int64_t>& shape,
                    const std::string& distribution, ScalarType dtype) {
  const Launcher launch(sample_ids);
  const std::optional<Tensor> ids = contiguous(sample_ids), seed = contiguous(key);
  std::vector<int64_t> sizes = {sample_ids.numel()};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  Tensor result = torch::stable::new_empty(sample_ids, sizes, dtype);
  const Samples samples = samples_of(result);
  with_dtype(dtype, [&](auto stored) {
    using Stored = decltype(stored);
    launch(philox_noise_kernel<Stored>, samples.blocks(), kThreads, samples, make_streams(ids, seed, role),
           distribution == "normal", static_cast<Stored*>(result.data_ptr()));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("philox_bits", TORCH_BOX(&philox_bits));
  m.impl("philox_noise", TORCH_BOX(&philox_noise));
}

}  // namespace erasediff::cuda
