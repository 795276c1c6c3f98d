// One pass over parameters, states and gradients, for any update rule (AdamW, Sgd) of shared/.
#pragma once

#include <vector>

#include "../shared/combine.h"
#include "capability.h"
#include "chunks.h"
#include "moments.h"
#include "noise.h"
#include "tile.h"

namespace erasediff::cpu {

constexpr int64_t kRoundingRole = 255;

// The streams of one tensor of the list; absent ones have null data.
struct Item {
  Flat param, retain, forget, ema, copy;
  Moment states[2];
  const uint8_t* mask = nullptr;
};

// The scalars of a step that do not belong to the rule.
struct Step {
  double coefficient, multiplier, clip_scale, one_minus_ema_decay;
  Dither dither;
  bool stochastic_rounding;
  int64_t seed, key_step;
};

template <class T>
ERASEDIFF_FN void combine_tile(const Combine<T>& combine, const T* retain, const T* forget, int64_t n, T* delta) {
  if (forget) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) delta[i] = combine(retain[i], forget[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) delta[i] = combine(retain[i]);
  }
}

template <bool masked, class T, class Rule>
ERASEDIFF_FN void update_tile(const Rule& rule, T* p, T* state0, T* state1, const T* delta, const uint8_t* keep,
                              int64_t n) {
  constexpr int kStates = Rule::kStates > 0 ? Rule::kStates : 1;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T old_p = p[i];
    T new_p = old_p, old_state[kStates], state[kStates];
    if constexpr (Rule::kStates > 0) state[0] = old_state[0] = state0[i];
    if constexpr (Rule::kStates > 1) state[1] = old_state[1] = state1[i];
    rule(new_p, state, delta[i]);
    if constexpr (masked) {
      new_p = select(keep[i], new_p, old_p);
      for (int k = 0; k < Rule::kStates; ++k) state[k] = select(keep[i], state[k], old_state[k]);
    }
    if constexpr (Rule::kStates > 0) state0[i] = state[0];
    if constexpr (Rule::kStates > 1) state1[i] = state[1];
    p[i] = new_p;
  }
}

// Writes parameters of a half type with stochastic rounding. Values that the type holds already, frozen ones among
// them, stay as they are.
template <class Stored, class T>
ERASEDIFF_FN void store_stochastically(const Step& step, int64_t tensor, int64_t first, int64_t n, const T* p,
                                       Stored* stored) {
  uint32_t random[kTile];
  draw_words(Philox(step.seed, step.key_step, tensor, kRoundingRole), first, n, random);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) stored[i] = Stochastic<Stored>::from(float(p[i]), random[i]);
}

template <class T, class Rule>
ERASEDIFF_FN void update_chunk(const Rule& rule, const Step& step, const Item& item, int64_t tensor, int64_t first,
                               int64_t size) {
  const Combine<T> combine{T(step.coefficient), T(step.multiplier), T(step.clip_scale)};
  const T one_minus_ema_decay = T(step.one_minus_ema_decay);
  T p_buffer[kTile], state0_buffer[kTile], state1_buffer[kTile], retain_buffer[kTile], forget_buffer[kTile];
  T delta[kTile], ema_buffer[kTile];
  uint8_t keep[kTile];
  for (const int64_t end = first + size; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    const T* retain = load(item.retain, first, n, retain_buffer);
    const T* forget = item.forget.data ? load(item.forget, first, n, forget_buffer) : nullptr;
    combine_tile(combine, retain, forget, n, delta);

    T* p = load(item.param, first, n, p_buffer);
    T* state0 = Rule::kStates > 0 ? load_moment(item.states[0], first, n, state0_buffer) : nullptr;
    T* state1 = Rule::kStates > 1 ? load_moment(item.states[1], first, n, state1_buffer) : nullptr;
    if (item.mask) {
      unpack_mask(item.mask, first, n, keep);
      update_tile<true>(rule, p, state0, state1, delta, keep, n);
    } else {
      update_tile<false>(rule, p, state0, state1, delta, nullptr, n);
    }
    if (step.stochastic_rounding && item.param.dtype == ScalarType::BFloat16) {
      store_stochastically(step, tensor, first, n, p, item.param.at<bf16>(first));
    } else if (step.stochastic_rounding && item.param.dtype == ScalarType::Half) {
      store_stochastically(step, tensor, first, n, p, item.param.at<fp16>(first));
    } else {
      store(item.param, first, n, p);
    }
    if (Rule::kStates > 0) store_moment(item.states[0], first, n, step.dither, state0);
    if (Rule::kStates > 1) store_moment(item.states[1], first, n, step.dither, state1);

    // EMA and copy follow the parameter as it is stored.
    if (item.ema.data || item.copy.data) p = load(item.param, first, n, p_buffer);
    if (item.ema.data) {
      T* ema = load(item.ema, first, n, ema_buffer);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) ema[i] = moving_average(ema[i], p[i], one_minus_ema_decay);
      store(item.ema, first, n, ema);
    }
    if (item.copy.data) store(item.copy, first, n, p);
  }
}

// `make_rule(T())` is the rule for arithmetic in T.
template <class MakeRule>
void constrained_update(const std::vector<Item>& items, const std::vector<Tensor>& params, const Step& step,
                        const MakeRule& make_rule) {
  const auto float_rule = make_rule(float());
  const auto double_rule = make_rule(double());
  const Chunks chunks(items.size(), [&](int64_t i) { return params[i].numel(); });
  chunks.for_each([&](int64_t, int64_t tensor, int64_t first, int64_t size) {
    with_capability([&]() ERASEDIFF_INLINE {
      if (items[tensor].param.dtype == ScalarType::Double) {
        update_chunk<double>(double_rule, step, items[tensor], tensor, first, size);
      } else {
        update_chunk<float>(float_rule, step, items[tensor], tensor, first, size);
      }
    });
  });
}

// A moment of all parameters: values, or codes and the absmax of their blocks.
struct MomentLists {
  const std::vector<Tensor>& stored;
  const std::vector<Tensor>* absmaxes = nullptr;

  Moment of(size_t i) const { return Moment(stored[i], absmaxes && !absmaxes->empty() ? &(*absmaxes)[i] : nullptr); }
};

// `states` holds as many lists as the rule has states; `forget`, `ema`, `copies` and `masks` may be empty.
inline std::vector<Item> make_items(const std::vector<Tensor>& params, const std::vector<MomentLists>& states,
                                    const std::vector<Tensor>& retain, const std::vector<Tensor>& forget,
                                    const std::vector<Tensor>& ema, const std::vector<Tensor>& copies,
                                    const std::vector<Tensor>& masks) {
  std::vector<Item> items(params.size());
  for (size_t i = 0; i < items.size(); ++i) {
    Item& item = items[i];
    item.param = Flat(params[i]);
    for (size_t state = 0; state < states.size(); ++state) item.states[state] = states[state].of(i);
    item.retain = Flat(retain[i]);
    if (!forget.empty()) item.forget = Flat(forget[i]);
    if (!ema.empty()) item.ema = Flat(ema[i]);
    if (!copies.empty()) item.copy = Flat(copies[i]);
    if (!masks.empty()) item.mask = static_cast<const uint8_t*>(masks[i].data_ptr());
  }
  return items;
}

// `multiplier` is 0-D, or holds both coefficients. `applied` counts the steps, this one included.
inline Step make_step(const Tensor& multiplier, const Tensor& clip_scale, float applied, double ema_decay,
                      const std::optional<Tensor>& rounding_key) {
  const bool both = multiplier.dim() == 1;
  Step step{both ? read_value(Flat(multiplier), 0) : 1.0,
            read_value(Flat(multiplier), both ? 1 : 0),
            read_value(Flat(clip_scale), 0),
            1.0 - ema_decay,
            Dither::at(applied),
            rounding_key.has_value(),
            0,
            0};
  if (rounding_key) {
    const int64_t* key = static_cast<const int64_t*>(rounding_key->data_ptr());
    step.seed = key[0];
    step.key_step = key[1];
  }
  return step;
}

}  // namespace erasediff::cpu
