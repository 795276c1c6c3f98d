// The public names of barriers and prediction types.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

#include "shared/constraint_multiplier.h"
#include "shared/losses.h"

namespace erasediff {

inline Barrier barrier_named(const std::string& name) {
  if (name == "norm") return Barrier::norm;
  if (name == "gap") return Barrier::gap;
  if (name == "fixed") return Barrier::fixed;
  STD_TORCH_CHECK(name == "cosine", "unknown barrier ", name);
  return Barrier::cosine;
}

inline PredictionType prediction_type_named(const std::string& name) {
  if (name == "epsilon") return PredictionType::epsilon;
  if (name == "v_prediction") return PredictionType::v_prediction;
  if (name == "sample") return PredictionType::sample;
  STD_TORCH_CHECK(name == "flow_prediction", "unknown prediction type ", name);
  return PredictionType::flow_prediction;
}

}  // namespace erasediff
