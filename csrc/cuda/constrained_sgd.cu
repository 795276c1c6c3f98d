#include <torch/csrc/stable/library.h>

#include "../lists.h"
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
  if (momentum_buffers.empty()) {
    const MakeSgd<0> make{Scalar(lr), momentum, nesterov, weight_decay};
    constrained_update<PlainSgd>({params, {}, {}, retain, forget, ema, copies, masks}, make, multiplier, clip_scale,
                                 finite, step, ema_decay, rounding_key);
  } else {
    const MakeSgd<1> make{Scalar(lr), momentum, nesterov, weight_decay};
    constrained_update<MomentumSgd>({params, {&momentum_buffers}, {}, retain, forget, ema, copies, masks}, make,
                                    multiplier, clip_scale, finite, step, ema_decay, rounding_key);
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("constrained_sgd_", TORCH_BOX(&constrained_sgd_));
}

}  // namespace erasediff::cuda
