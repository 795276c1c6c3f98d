// AdamW (Loshchilov & Hutter, ICLR 2019) on one element. T is float, or double for float64 parameters.
#pragma once

#include "portable.h"

namespace erasediff {

// base^exponent for whole exponents >= 0, with the same bits on every device.
ERASEDIFF_FN double power(double base, double exponent) {
  double result = 1.0;
  for (uint64_t n = uint64_t(exponent); n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

template <class T>
struct AdamW {
  static constexpr int kStates = 2;

  T decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root, eps;

  // `step` counts the steps that have been applied, this one included.
  static ERASEDIFF_FN AdamW make(double lr, double step, double beta1, double beta2, double eps, double weight_decay) {
    return {T(1.0 - lr * weight_decay),
            T(beta1),
            T(1.0 - beta1),
            T(beta2),
            T(1.0 - beta2),
            T(lr / (1.0 - power(beta1, step))),
            T(1.0 / sqrt(1.0 - power(beta2, step))),
            T(eps)};
  }

  ERASEDIFF_FN void operator()(T& p, T* state, T delta) const {
    T& m = state[0];
    T& v = state[1];
    m = beta1 * m + one_minus_beta1 * delta;
    v = beta2 * v + one_minus_beta2 * (delta * delta);
    p = decay * p - step_size * (m / (T(sqrt(v)) * inverse_root + eps));
  }
};

}  // namespace erasediff
