#include <torch/csrc/stable/library.h>

#include "../lists.h"
#include "../shared/constrained_adamw.h"
#include "constrained_update.h"

namespace erasediff::cpu {
namespace {

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
  if (!*Flat(finite).at<bool>(0)) return true;
  float& applied = *Flat(step).at<float>(0);
  applied += 1.0f;
  const std::vector<MomentLists> moments{{exp_avgs, &exp_avg_absmaxes}, {exp_avg_sqs, &exp_avg_sq_absmaxes}};
  constrained_update(make_items(params, moments, retain, forget, ema, copies, masks), params,
                     make_step(multiplier, clip_scale, applied, ema_decay, rounding_key), [&](auto zero) {
                       return AdamW<decltype(zero)>::make(read_value(Flat(lr), 0), applied, beta1, beta2, eps,
                                                          weight_decay);
                     });
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("constrained_adamw_", TORCH_BOX(&constrained_adamw_)); }

}  // namespace erasediff::cpu
