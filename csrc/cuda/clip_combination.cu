#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../shared/constraint_multiplier.h"
#include "scalar.cuh"

namespace erasediff::cuda {
namespace {

__global__ void clip_combination_kernel(const double* gram, Scalar coefficients, double max_norm, float* multiplier,
                                        float* clip_scale, float* norm, bool* finite) {
  const Constraint c = clip(gram[0], gram[1], gram[2], coefficients.read(0), coefficients.read(1), max_norm);
  multiplier[0] = c.coefficient;
  multiplier[1] = c.multiplier;
  *clip_scale = c.clip_scale;
  *norm = c.norm;
  *finite = c.finite;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_combination(const Tensor& gram, const Tensor& coefficients,
                                                            std::optional<double> max_norm) {
  const Launcher launch(gram);
  const Tensor values = torch::stable::contiguous(gram), both = torch::stable::contiguous(coefficients);
  Tensor multiplier = torch::stable::new_empty(gram, {2}, ScalarType::Float);
  Tensor clip_scale = torch::stable::new_empty(gram, {}, ScalarType::Float);
  Tensor norm = torch::stable::new_empty(gram, {}, ScalarType::Float);
  Tensor finite = torch::stable::new_empty(gram, {}, ScalarType::Bool);
  launch(clip_combination_kernel, 1, 1, static_cast<const double*>(values.data_ptr()), Scalar(both),
         max_norm.value_or(-1.0), static_cast<float*>(multiplier.data_ptr()),
         static_cast<float*>(clip_scale.data_ptr()), static_cast<float*>(norm.data_ptr()),
         static_cast<bool*>(finite.data_ptr()));
  return {multiplier, clip_scale, norm, finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("clip_combination", TORCH_BOX(&clip_combination));
}

}  // namespace erasediff::cuda
