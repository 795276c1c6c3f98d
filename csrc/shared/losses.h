// Targets that the prediction is compared with, on one element. Names as in diffusers.
#pragma once

#include "portable.h"

namespace erasediff {

enum class PredictionType { epsilon, v_prediction, sample, flow_prediction };

template <PredictionType type, class T>
ERASEDIFF_FN T denoising_target(T sample, T noise, T alpha, T sigma) {
  if constexpr (type == PredictionType::epsilon) return noise;
  if constexpr (type == PredictionType::v_prediction) return alpha * noise - sigma * sample;
  if constexpr (type == PredictionType::sample) return sample;
  if constexpr (type == PredictionType::flow_prediction) return noise - sample;
}

}  // namespace erasediff
