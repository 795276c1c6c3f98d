// sum_b weight_b mean_e (prediction - target)^2 and its gradient in one pass, for any target.
#pragma once

#include <tuple>

#include "samples.cuh"

namespace erasediff::cuda {

// `target` is called as target(sample, numel, i, values) for `values` from element i of a sample on, and says with
// target.allows_wide(offset) whether what it reads is aligned for the sample that begins at `offset`.
// Three blocks per multiprocessor leave it enough registers; left alone, the compiler spills one for sm_100.
template <class Stored, class Target>
__global__ void __launch_bounds__(kThreads, 3)
    squared_error_kernel(Samples samples, const Stored* prediction, const Compute<Stored>* weight, Target target,
                         Stored* grad, double* partials) {
  using T = Compute<Stored>;
  const Samples::Piece piece = samples.piece();
  const int64_t offset = piece.sample * samples.numel;
  const T w = weight[piece.sample];
  const T coefficient = T(2) * w / T(samples.numel);
  const bool wide = aligned(prediction + offset, grad + offset) && target.allows_wide(offset);
  double sum = 0.0;
  for_each_element<kWide<Stored>>(piece.first, piece.end, wide, [&](auto n, int64_t i) {
    T error[n.value], values[n.value];
    load(prediction + offset + i, error);
    target(piece.sample, samples.numel, i, values);
#pragma unroll
    for (int k = 0; k < n.value; ++k) {
      error[k] -= values[k];
      sum += double(error[k]) * double(error[k]);
      error[k] *= coefficient;
    }
    store_nearest(grad + offset + i, error);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum * (double(w) / double(samples.numel));
}

// `make_target(Stored())` is the target for predictions of that type.
template <class MakeTarget>
std::tuple<Tensor, Tensor> squared_error(const Tensor& prediction, const Tensor& weight,
                                         const MakeTarget& make_target) {
  const Launcher launch(prediction);
  const Tensor weights = torch::stable::contiguous(weight);
  const Samples samples = samples_of(prediction);
  const bool wide = prediction.scalar_type() == ScalarType::Double;
  Tensor grad = torch::stable::new_empty(prediction, prediction.sizes());
  Tensor loss = torch::stable::new_empty(prediction, {}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor partials = torch::stable::new_empty(prediction, {samples.blocks()}, ScalarType::Double);
  auto* sums = static_cast<double*>(partials.data_ptr());
  with_dtype(prediction.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    using T = Compute<Stored>;
    using Target = decltype(make_target(stored));
    launch(squared_error_kernel<Stored, Target>, samples.blocks(), kThreads, samples,
           static_cast<const Stored*>(prediction.data_ptr()), static_cast<const T*>(weights.data_ptr()),
           make_target(stored), static_cast<Stored*>(grad.data_ptr()), sums);
    launch(sum_columns<T>, 1, kThreads, sums, samples.blocks(), 1, static_cast<T*>(loss.data_ptr()));
  });
  return {loss, grad};
}

}  // namespace erasediff::cuda
