#include <torch/csrc/stable/library.h>

#include "../shared/constrained_sgd.h"
#include "constrained_update.h"

namespace erasediff::cpu {
namespace {

void constrained_sgd_(const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                      const std::vector<Tensor>& retain, const std::vector<Tensor>& forget,
                      const std::vector<Tensor>& ema, const std::vector<Tensor>& copies,
                      const std::vector<Tensor>& masks, const Tensor& multiplier, const Tensor& clip_scale,
                      const Tensor& finite, const Tensor& lr, const Tensor& step, double momentum, bool nesterov,
                      double weight_decay, double ema_decay, const std::optional<Tensor>& rounding_key) {
  if (!*Flat(finite).at<bool>(0)) return;
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
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_C, CPU, m) { m.impl("constrained_sgd_", TORCH_BOX(&constrained_sgd_)); }

}  // namespace erasediff::cpu
