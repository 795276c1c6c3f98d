#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../names.h"
#include "scalar.cuh"

namespace erasediff::cuda {
namespace {

__global__ void constraint_multiplier_kernel(const double* gram, Barrier barrier, double eta, Scalar gap,
                                             double max_norm, float* multiplier, float* clip_scale, float* norm,
                                             bool* finite) {
  const Constraint c =
      constrain(gram[0], gram[1], gram[2], barrier, eta, barrier == Barrier::gap ? gap.read() : 0.0, max_norm);
  *multiplier = c.multiplier;
  *clip_scale = c.clip_scale;
  *norm = c.norm;
  *finite = c.finite;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> constraint_multiplier(const Tensor& gram, const std::string& barrier,
                                                                 double eta, const std::optional<Tensor>& gap,
                                                                 std::optional<double> max_norm) {
  const Launcher launch(gram);
  const Tensor values = torch::stable::contiguous(gram);
  Tensor multiplier = torch::stable::new_empty(gram, {}, ScalarType::Float);
  Tensor clip_scale = torch::stable::new_empty(gram, {}, ScalarType::Float);
  Tensor norm = torch::stable::new_empty(gram, {}, ScalarType::Float);
  Tensor finite = torch::stable::new_empty(gram, {}, ScalarType::Bool);
  launch(constraint_multiplier_kernel, 1, 1, static_cast<const double*>(values.data_ptr()), barrier_named(barrier), eta,
         gap ? Scalar(*gap) : Scalar(), max_norm.value_or(-1.0), static_cast<float*>(multiplier.data_ptr()),
         static_cast<float*>(clip_scale.data_ptr()), static_cast<float*>(norm.data_ptr()),
         static_cast<bool*>(finite.data_ptr()));
  return {multiplier, clip_scale, norm, finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("constraint_multiplier", TORCH_BOX(&constraint_multiplier));
}

}  // namespace erasediff::cuda
