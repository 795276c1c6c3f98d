// delta = clip_scale (coefficient retain + multiplier forget), and the exponential moving average, on one element.
#pragma once

#include "portable.h"

namespace erasediff {

template <class T>
struct Combine {
  // `coefficient` is 1 where only a multiplier was given: a product with it changes no bit.
  T coefficient, multiplier, clip_scale;

  ERASEDIFF_FN T operator()(T retain, T forget) const {
    return clip_scale * (coefficient * retain + multiplier * forget);
  }
  ERASEDIFF_FN T operator()(T retain) const { return clip_scale * (coefficient * retain); }
};

template <class T>
ERASEDIFF_FN T moving_average(T average, T p, T one_minus_decay) {
  return average + one_minus_decay * (p - average);
}

}  // namespace erasediff
