#include <torch/csrc/stable/library.h>

#include "../shared/constrained_sgd.h"
#include "constrained_update.cuh"

namespace erasediff::cuda {
namespace {

template <class T>
using PlainSgd = Sgd<T, 0>;
template <class T>
using MomentumSgd = Sgd<T, 1>;

template <int states>
struct MakeSgd {
  Scalar lr;
  double momentum;
  bool nesterov;
  double weight_decay;

  template <class T>
  __device__ Sgd<T, states> operator()(T) const {
    return Sgd<T, states>::make(lr.read(), momentum, nesterov, weight_decay);
  }
};

void constrained_sgd_(const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                      const std::vector<Tensor>& retain, const std::vector<Tensor>& forget,
                      const std::vector<Tensor>& ema, const std::vector<Tensor>& copies,
                      const std::vector<Tensor>& masks, const Tensor& multiplier, const Tensor& clip_scale,
                      const Tensor& finite, const Tensor& lr, const Tensor& step, double momentum, bool nesterov,
                      double weight_decay, double ema_decay, const std::optional<Tensor>& rounding_key) {
  if (momentum_buffers.empty()) {
    const MakeSgd<0> make{Scalar(lr), momentum, nesterov, weight_decay};
    constrained_update<PlainSgd>({params, {}, {}, retain, forget, ema, copies, masks}, make, multiplier, clip_scale, finite,
                                 step, ema_decay, rounding_key);
  } else {
    const MakeSgd<1> make{Scalar(lr), momentum, nesterov, weight_decay};
    constrained_update<MomentumSgd>({params, {&momentum_buffers}, {}, retain, forget, ema, copies, masks}, make, multiplier,
                                    clip_scale, finite, step, ema_decay, rounding_key);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_C, ERASEDIFF_DEVICE, m) {
  m.impl("constrained_sgd_", TORCH_BOX(&constrained_sgd_));
}

}  // namespace erasediff::cuda
