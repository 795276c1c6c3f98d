// From the Gram values of the two gradients to the multiplier, the clip scale and the verdict on finiteness.
#pragma once

#include "portable.h"

namespace erasediff {

enum class Barrier { norm, gap, fixed, cosine };

// `coefficient` of the retain gradient, `multiplier` of the forget gradient.
struct Constraint {
  float coefficient, multiplier, clip_scale, norm;
  bool finite;
};

ERASEDIFF_FN bool is_finite(double x) { return x - x == 0.0; }

// Norm, clip scale and verdict for coefficient r + multiplier g; max_norm < 0 means no clipping.
ERASEDIFF_FN Constraint clip(double rr, double rf, double ff, double coefficient, double multiplier, double max_norm) {
  // The norm of the combination that will be applied, hence with the coefficients as fp32 holds them.
  Constraint result{};
  result.coefficient = float(coefficient);
  result.multiplier = float(multiplier);
  const double a = result.coefficient, b = result.multiplier;
  const double square = a * a * rr + 2.0 * a * b * rf + b * b * ff;
  const double norm = sqrt(square < 0.0 ? 0.0 : square);
  const double scale = max_norm / (norm + 1e-6);
  result.norm = float(norm);
  result.clip_scale = max_norm < 0.0 || scale > 1.0 ? 1.0f : float(scale);
  result.finite = is_finite(rr) && is_finite(rf) && is_finite(ff) && is_finite(norm);
  return result;
}

// `gap` is read for Barrier::gap only.
ERASEDIFF_FN Constraint constrain(double rr, double rf, double ff, Barrier barrier, double eta, double gap,
                                  double max_norm) {
  double multiplier = eta;
  bool finite = true;
  if (barrier != Barrier::fixed) {
    if (barrier == Barrier::norm) multiplier = eta - rf / ff;
    if (barrier == Barrier::cosine) multiplier = eta - rf / (rr * ff == 0.0 ? 1.0 : sqrt(rr * ff));
    if (barrier == Barrier::gap) {
      multiplier = (eta * (gap < 0.0 ? 0.0 : gap) - rf) / ff;
      finite = is_finite(gap);
    }
    multiplier = ff == 0.0 || multiplier < 0.0 ? 0.0 : multiplier;
  }
  Constraint result = clip(rr, rf, ff, 1.0, multiplier, max_norm);
  result.finite = result.finite && finite;
  return result;
}

}  // namespace erasediff
