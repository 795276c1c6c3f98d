// One pass over parameters, states and gradients, for any update rule (AdamW, Sgd) of shared/.
#pragma once

#include <map>
#include <optional>
#include <tuple>

#include "../shared/combine.h"
#include "../shared/philox.h"
#include "multi_tensor.cuh"
#include "scalar.cuh"

namespace erasediff::cuda {

constexpr int kRoundingRole = 255;

enum Stream { kParam, kState0, kState1, kRetain, kForget, kEma, kCopy, kMask, kStreams };

struct UpdateBatch : Batch<kStreams> {
  ScalarType ema_dtype, copy_dtype;
};

// Everything that a step needs and that is only known on the device; made once per step by the first kernel.
template <template <class> class Rule>
struct Step {
  Rule<float> float_rule;
  Rule<double> double_rule;
  double multiplier, clip_scale, one_minus_ema_decay;
  bool finite;

  template <class T>
  __device__ __forceinline__ const Rule<T>& rule() const {
    if constexpr (std::is_same_v<T, double>)
      return double_rule;
    else
      return float_rule;
  }
};

// `make(T())` is the rule for arithmetic in T; it sees the step that is now being applied.
template <template <class> class Rule, class Make>
__global__ void prepare_step(Make make, Scalar multiplier, Scalar clip_scale, const bool* finite, float* applied,
                             double ema_decay, Step<Rule>* step) {
  step->finite = *finite;
  if (!*finite) return;
  *applied += 1.0f;
  step->float_rule = make(float());
  step->double_rule = make(double());
  step->multiplier = multiplier.read();
  step->clip_scale = clip_scale.read();
  step->one_minus_ema_decay = 1.0 - ema_decay;
}

// EMA and copies may have any type, the same for all tensors of a launch.
template <int n, class T>
__device__ __forceinline__ void load_any(const char* data, ScalarType dtype, int64_t i, T (&values)[n]) {
  if (dtype == ScalarType::Float) load(reinterpret_cast<const float*>(data) + i, values);
  if (dtype == ScalarType::BFloat16) load(reinterpret_cast<const bf16*>(data) + i, values);
  if (dtype == ScalarType::Half) load(reinterpret_cast<const fp16*>(data) + i, values);
  if (dtype == ScalarType::Double) load(reinterpret_cast<const double*>(data) + i, values);
}

template <int n, class T>
__device__ __forceinline__ void store_any(char* data, ScalarType dtype, int64_t i, const T (&values)[n]) {
  if (dtype == ScalarType::Float) store_nearest(reinterpret_cast<float*>(data) + i, values);
  if (dtype == ScalarType::BFloat16) store_nearest(reinterpret_cast<bf16*>(data) + i, values);
  if (dtype == ScalarType::Half) store_nearest(reinterpret_cast<fp16*>(data) + i, values);
  if (dtype == ScalarType::Double) store_nearest(reinterpret_cast<double*>(data) + i, values);
}

// Rounds parameters to how they are stored, at random where there is a key.
template <int n, class P, class T>
__device__ __forceinline__ void round_params(const int64_t* key, int64_t place, int64_t i, const T (&values)[n],
                                             P (&rounded)[n]) {
  if (sizeof(P) < 4 && key) {
    const Philox philox(key[0], key[1], place, kRoundingRole);
#pragma unroll
    for (int k = 0; k < n; k += 4) {
      const Words words = philox.block(uint32_t((i + k) / 4));
#pragma unroll
      for (int lane = 0; lane < 4 && lane < n; ++lane) {
        const uint32_t random = n == 1 ? words.at(i) : words.word[lane];
        rounded[k + lane] = Stochastic<P>::from(float(values[k + lane]), random);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) rounded[k] = narrow<P>(values[k]);
  }
}

template <class P, class M, class G, template <class> class Rule>
__global__ void __launch_bounds__(kThreads)
    constrained_update_kernel(const __grid_constant__ UpdateBatch batch, const Step<Rule>* step, const int64_t* key) {
  using T = Compute<P>;
  constexpr int kStates = Rule<T>::kStates;
  constexpr int kWide = sizeof(P) < 4 || sizeof(M) < 4 || sizeof(G) < 4 ? 8 : 4;
  if (!step->finite) return;
  const Piece piece = piece_of_block(batch);
  const int t = piece.tensor;
  auto* params = static_cast<P*>(batch.data[kParam][t]);
  M* const states[2] = {static_cast<M*>(batch.data[kState0][t]), static_cast<M*>(batch.data[kState1][t])};
  const auto* retain = static_cast<const G*>(batch.data[kRetain][t]);
  const auto* forget = static_cast<const G*>(batch.data[kForget][t]);
  auto* ema = static_cast<char*>(batch.data[kEma][t]);
  auto* copy = static_cast<char*>(batch.data[kCopy][t]);
  const auto* mask = static_cast<const uint8_t*>(batch.data[kMask][t]);
  const Rule<T> rule = step->template rule<T>();
  const Combine<T> combine{T(step->multiplier), T(step->clip_scale)};

  const bool wide = aligned(params, states[0], states[1], retain, forget, ema, copy);
  for_each_element<kWide>(piece.first, piece.end, wide, [&](auto n, int64_t i) {
    T p[n.value], r[n.value], g[n.value], s[2][n.value] = {};
    load(retain + i, r);
    if (forget) load(forget + i, g);
    load(params + i, p);
#pragma unroll
    for (int j = 0; j < kStates; ++j) load(states[j] + i, s[j]);
    const uint32_t kept = mask ? mask_bits(mask, i) : ~0u;

#pragma unroll
    for (int k = 0; k < n.value; ++k) {
      T new_p = p[k], new_s[2] = {s[0][k], s[1][k]};
      rule(new_p, new_s, forget ? combine(r[k], g[k]) : combine(r[k]));
      const bool keep = kept >> k & 1;
      p[k] = keep ? new_p : p[k];
#pragma unroll
      for (int j = 0; j < kStates; ++j) s[j][k] = keep ? new_s[j] : s[j][k];
    }

    P rounded[n.value];
    round_params(key, batch.place[t], i, p, rounded);
    store(params + i, rounded);
#pragma unroll
    for (int j = 0; j < kStates; ++j) store_nearest(states[j] + i, s[j]);

    // What follows sees the parameter as it is stored.
#pragma unroll
    for (int k = 0; k < n.value; ++k) p[k] = widen<T>(rounded[k]);
    if (copy) store_any(copy, batch.copy_dtype, i, p);
    if (ema) {
      T average[n.value];
      load_any(ema, batch.ema_dtype, i, average);
#pragma unroll
      for (int k = 0; k < n.value; ++k) average[k] = moving_average(average[k], p[k], T(step->one_minus_ema_decay));
      store_any(ema, batch.ema_dtype, i, average);
    }
  });
}

// The lists of a step. `states` holds as many lists as the rule has states.
struct Lists {
  const std::vector<Tensor>& params;
  std::vector<const std::vector<Tensor>*> states;
  const std::vector<Tensor>&retain, &forget, &ema, &copies, &masks;
};

// Parameters, moments and gradients of these types have a kernel; gradients of another type are converted to fp32, or
// to fp64 for fp64 parameters.
template <class P, class M, class G>
constexpr bool kHasKernel =
    std::is_same_v<P, double> ? std::is_same_v<G, double> && !std::is_same_v<M, bf16> && !std::is_same_v<M, fp16>
                              : !std::is_same_v<G, double> && !std::is_same_v<M, double> &&
                                    (std::is_same_v<M, float> || std::is_same_v<M, P>);

inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <template <class> class Rule, class Make>
void constrained_update(const Lists& lists, const Make& make, const Tensor& multiplier, const Tensor& clip_scale,
                        const Tensor& finite, const Tensor& applied, double ema_decay,
                        const std::optional<Tensor>& rounding_key) {
  const Launcher launch(applied);
  Tensor buffer = torch::stable::new_empty(applied, {int64_t(sizeof(Step<Rule>))}, ScalarType::Byte);
  auto* step = static_cast<Step<Rule>*>(buffer.data_ptr());
  launch(prepare_step<Rule, Make>, 1, 1, make, Scalar(multiplier), Scalar(clip_scale),
         static_cast<const bool*>(finite.data_ptr()), static_cast<float*>(applied.data_ptr()), ema_decay, step);
  const auto* key = rounding_key ? static_cast<const int64_t*>(rounding_key->data_ptr()) : nullptr;

  // One launch per combination of types, as far as the argument holds the pointers.
  std::vector<Tensor> retain(lists.retain), forget(lists.forget);
  std::map<std::tuple<ScalarType, ScalarType, ScalarType, ScalarType, ScalarType>, std::vector<int64_t>> groups;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const ScalarType p = lists.params[i].scalar_type();
    const bool same = forget.empty() || retain[i].scalar_type() == forget[i].scalar_type();
    const bool wide = p == ScalarType::Double || retain[i].scalar_type() == ScalarType::Double;
    if (!same || wide) {
      const ScalarType g = p == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
      retain[i] = in_dtype(retain[i], g);
      if (!forget.empty()) forget[i] = in_dtype(forget[i], g);
    }
    const ScalarType m = lists.states.empty() ? p : (*lists.states[0])[i].scalar_type();
    groups[{p, m, retain[i].scalar_type(), lists.ema.empty() ? p : lists.ema[i].scalar_type(),
            lists.copies.empty() ? p : lists.copies[i].scalar_type()}]
        .push_back(i);
  }
  const auto pointer = [](const std::vector<Tensor>& list, int64_t i) {
    return list.empty() ? nullptr : list[i].data_ptr();
  };
  const auto fill = [&](UpdateBatch& batch, int64_t i) {
    const int32_t k = batch.count;
    batch.data[kParam][k] = lists.params[i].data_ptr();
    for (int s = 0; s < 2; ++s) {
      batch.data[kState0 + s][k] = s < int(lists.states.size()) ? (*lists.states[s])[i].data_ptr() : nullptr;
    }
    batch.data[kRetain][k] = retain[i].data_ptr();
    batch.data[kForget][k] = pointer(forget, i);
    batch.data[kEma][k] = pointer(lists.ema, i);
    batch.data[kCopy][k] = pointer(lists.copies, i);
    batch.data[kMask][k] = pointer(lists.masks, i);
    batch.ema_dtype = lists.ema.empty() ? ScalarType::Float : lists.ema[i].scalar_type();
    batch.copy_dtype = lists.copies.empty() ? ScalarType::Float : lists.copies[i].scalar_type();
  };
  for (const auto& [dtypes, members] : groups) {
    with_dtype(std::get<0>(dtypes), [&, &dtypes = dtypes, &members = members](auto p) {
      with_dtype(std::get<1>(dtypes), [&](auto m) {
        with_dtype(std::get<2>(dtypes), [&](auto g) {
          using P = decltype(p);
          using M = decltype(m);
          using G = decltype(g);
          if constexpr (kHasKernel<P, M, G>) {
            for_each_batch<UpdateBatch>(
                members, [&](int64_t i) { return lists.params[i].numel(); }, fill,
                [&](const UpdateBatch& batch) {
                  launch(constrained_update_kernel<P, M, G, Rule>, batch.chunks(), kThreads, batch, step, key);
                });
          }
        });
      });
    });
  }
}

}  // namespace erasediff::cuda
