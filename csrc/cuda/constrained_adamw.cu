#include <torch/csrc/stable/library.h>

#include "../lists.h"
#include "../shared/constrained_adamw.h"
#include "constrained_update.cuh"

namespace erasediff::cuda {
namespace {

struct MakeAdamW {
  Scalar lr;
  const float* applied;
  double beta1, beta2, eps, weight_decay;

  template <class T>
  __device__ AdamW<T> operator()(T) const {
    return AdamW<T>::make(lr.read(), *applied, beta1, beta2, eps, weight_decay);
  }
};

bool constrained_adamw_(const TensorList& params, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                        const TensorList& exp_avg_absmaxes, const TensorList& exp_avg_sq_absmaxes,
                        const TensorList& retain, const TensorList& forget, const TensorList& ema,
                        const TensorList& copies, const TensorList& masks, const Tensor& multiplier,
                        const Tensor& clip_scale, const Tensor& finite, const Tensor& lr, const Tensor& step,
                        double beta1, double beta2, double eps, double weight_decay, double ema_decay,
                        const std::optional<Tensor>& rounding_key) {
  const UpdateArguments arguments{params,     retain,     forget, ema, copies, masks,
                                  multiplier, clip_scale, finite, lr,  step,   rounding_key};
  if (!arguments.are_valid({&exp_avgs, &exp_avg_sqs}, {&exp_avg_absmaxes, &exp_avg_sq_absmaxes})) return false;
  const MakeAdamW make{Scalar(lr), static_cast<const float*>(step.data_ptr()), beta1, beta2, eps, weight_decay};
  const Lists lists{
      params, {&exp_avgs, &exp_avg_sqs}, {&exp_avg_absmaxes, &exp_avg_sq_absmaxes}, retain, forget, ema, copies, masks};
  constrained_update<AdamW>(lists, make, multiplier, clip_scale, finite, step, ema_decay, rounding_key);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("constrained_adamw_", TORCH_BOX(&constrained_adamw_));
}

}  // namespace erasediff::cuda
