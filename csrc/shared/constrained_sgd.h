// SGD with decoupled weight decay on one element, with momentum (one state) or without (none).
#pragma once

#include "portable.h"

namespace erasediff {

template <class T, int States>
struct Sgd {
  static constexpr int kStates = States;

  T decay, lr, momentum, nesterov;

  static ERASEDIFF_FN Sgd make(double lr, double momentum, bool nesterov, double weight_decay) {
    return {T(1.0 - lr * weight_decay), T(lr), T(momentum), nesterov ? T(momentum) : T(0)};
  }

  ERASEDIFF_FN void operator()(T& p, T* state, T delta) const {
    T direction = delta;
    if constexpr (States > 0) {
      state[0] = momentum * state[0] + delta;
      // Chosen, not multiplied by zero: 0 * inf would be NaN.
      direction = nesterov != T(0) ? delta + nesterov * state[0] : state[0];
    }
    p = decay * p - lr * direction;
  }
};

}  // namespace erasediff
