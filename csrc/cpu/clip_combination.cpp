#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../shared/constraint_multiplier.h"
#include "scalar.h"
#include "tile.h"

namespace erasediff::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_combination(const Tensor& gram, const Tensor& coefficients,
                                                            std::optional<double> max_norm) {
  const Tensor values = torch::stable::contiguous(gram), both = torch::stable::contiguous(coefficients);
  const double* g = static_cast<const double*>(values.data_ptr());
  const Constraint c =
      clip(g[0], g[1], g[2], read_value(Flat(both), 0), read_value(Flat(both), 1), max_norm.value_or(-1.0));
  Tensor multiplier = torch::stable::new_empty(gram, {2}, ScalarType::Float);
  float* rounded = static_cast<float*>(multiplier.data_ptr());
  rounded[0] = c.coefficient;
  rounded[1] = c.multiplier;
  return {multiplier, scalar(gram, ScalarType::Float, c.clip_scale), scalar(gram, ScalarType::Float, c.norm),
          scalar(gram, ScalarType::Bool, c.finite)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("clip_combination", TORCH_BOX(&clip_combination)); }

}  // namespace erasediff::cpu
