#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>

#include "../names.h"
#include "scalar.h"
#include "tile.h"

namespace erasediff::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> constraint_multiplier(const Tensor& gram, const std::string& barrier,
                                                                 double eta, const std::optional<Tensor>& gap,
                                                                 std::optional<double> max_norm) {
  const Tensor values = torch::stable::contiguous(gram);
  const double* g = static_cast<const double*>(values.data_ptr());
  const double gap_value = gap ? read_value(Flat(*gap), 0) : 0.0;
  const Constraint c = constrain(g[0], g[1], g[2], barrier_named(barrier), eta, gap_value, max_norm.value_or(-1.0));
  return {scalar(gram, ScalarType::Float, c.multiplier), scalar(gram, ScalarType::Float, c.clip_scale),
          scalar(gram, ScalarType::Float, c.norm), scalar(gram, ScalarType::Bool, c.finite)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) {
  m.impl("constraint_multiplier", TORCH_BOX(&constraint_multiplier));
}

}  // namespace erasediff::cpu
