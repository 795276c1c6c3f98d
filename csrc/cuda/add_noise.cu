#include <torch/csrc/stable/library.h>

#include "samples.cuh"

namespace erasediff::cuda {
namespace {

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    add_noise_kernel(Samples samples, const Stored* sample, const Compute<Stored>* alpha, const Compute<Stored>* sigma,
                     Noise<Stored> noise, Stored* result) {
  using T = Compute<Stored>;
  const Samples::Piece piece = samples.piece();
  const int64_t offset = piece.sample * samples.numel;
  const T a = alpha[piece.sample], s = sigma[piece.sample];
  const bool wide = aligned(sample + offset, result + offset, noise.given ? noise.given + offset : nullptr);
  for_each_element<kWide<Stored>>(piece.first, piece.end, wide, [&](auto n, int64_t i) {
    T x[n.value], epsilon[n.value];
    load(sample + offset + i, x);
    noise.read(piece.sample, samples.numel, i, epsilon);
#pragma unroll
    for (int k = 0; k < n.value; ++k) x[k] = a * x[k] + s * epsilon[k];
    store_nearest(result + offset + i, x);
  });
}

Tensor add_noise(const Tensor& sample_any, const Tensor& alpha, const Tensor& sigma,
                 const std::optional<Tensor>& noise_any, const std::optional<Tensor>& sample_ids,
                 const std::optional<Tensor>& key, int64_t role) {
  const Tensor sample = torch::stable::contiguous(sample_any);
  const Tensor alphas = torch::stable::contiguous(alpha), sigmas = torch::stable::contiguous(sigma);
  const std::optional<Tensor> given = contiguous_like(noise_any, sample);
  const std::optional<Tensor> ids = contiguous(sample_ids), seed = contiguous(key);
  Tensor result = torch::stable::new_empty(sample, sample.sizes());
  const Samples samples = samples_of(sample);
  const Launcher launch(sample);
  with_dtype(sample.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    using T = Compute<Stored>;
    const Noise<Stored> noise{data_of<Stored>(given), make_streams(ids, seed, role), /*gaussian=*/true};
    launch(add_noise_kernel<Stored>, samples.blocks(), kThreads, samples, static_cast<const Stored*>(sample.data_ptr()),
           static_cast<const T*>(alphas.data_ptr()), static_cast<const T*>(sigmas.data_ptr()), noise,
           static_cast<Stored*>(result.data_ptr()));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) { m.impl("add_noise", TORCH_BOX(&add_noise)); }

}  // namespace erasediff::cuda
