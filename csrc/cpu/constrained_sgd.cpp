#include <torch/csrc/stable/library.h>

#include "../lists.h"
#include "../shared/constrained_sgd.h"
#include "constrained_update.h"

namespace erasediff::cpu {
namespace {

bool constrained_sgd_(const TensorList& params, const TensorList& momentum_buffers, const TensorList& retain,
                      const TensorList& forget, const TensorList& ema, const TensorList& copies,
                      const TensorList& masks, const Tensor& multiplier, const Tensor& clip_scale, const Tensor& finite,
                      const Tensor& lr, const Tensor& step, double momentum, bool nesterov, double weight_decay,
                      double ema_decay, const std::optional<Tensor>& rounding_key) {
  const UpdateArguments arguments{params,     retain,     forget, ema, copies, masks,
                                  multiplier, clip_scale, finite, lr,  step,   rounding_key};
  std::vector<const TensorList*> states;
  if (!momentum_buffers.empty()) states.push_back(&momentum_buffers);
  if (!arguments.are_valid(states)) return false;
  if (!*Flat(finite).at<bool>(0)) return true;
  float& applied = *Flat(step).at<float>(0);
  applied += 1.0f;
  const Step scalars = make_step(multiplier, clip_scale, applied, ema_decay, rounding_key);
  const auto update = [&](auto states, const std::vector<Item>& items) {
    constrained_update(items, params, scalars, [&](auto zero) {
      return Sgd<decltype(zero), decltype(states)::value>::make(read_value(Flat(lr), 0), momentum, nesterov,
                                                                weight_decay);
    });
  };
  if (momentum_buffers.empty()) {
    update(std::integral_constant<int, 0>(), make_items(params, {}, retain, forget, ema, copies, masks));
  } else {
    update(std::integral_constant<int, 1>(),
           make_items(params, {{momentum_buffers}}, retain, forget, ema, copies, masks));
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("constrained_sgd_", TORCH_BOX(&constrained_sgd_)); }

}  // namespace erasediff::cpu
