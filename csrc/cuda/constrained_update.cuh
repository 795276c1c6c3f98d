// One pass over parameters, states and gradients, for any update rule (AdamW, Sgd) of shared/.
#pragma once

#include <map>
#include <optional>
#include <tuple>

#include "../shared/combine.h"
#include "../shared/moment_codes.h"
#include "../shared/philox.h"
#include "multi_tensor.cuh"
#include "scalar.cuh"

namespace erasediff::cuda {

constexpr int kRoundingRole = 255;

enum Stream { kParam, kState0, kState1, kAbsmax0, kAbsmax1, kRetain, kForget, kEma, kCopy, kMask, kStreams };

struct UpdateBatch : Batch<kStreams> {
  ScalarType ema_dtype, copy_dtype;
};

// Everything that a step needs and that is only known on the device; made once per step by the first kernel.
template <template <class> class Rule>
struct Step {
  Rule<float> float_rule;
  Rule<double> double_rule;
  double coefficient, multiplier, clip_scale, one_minus_ema_decay;
  Dither dither;
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
__global__ void prepare_step(Make make, Coefficients coefficients, Scalar clip_scale, const bool* finite,
                             float* applied, double ema_decay, Step<Rule>* step) {
  step->finite = *finite;
  if (!*finite) return;
  *applied += 1.0f;
  step->float_rule = make(float());
  step->double_rule = make(double());
  step->coefficient = coefficients.retain();
  step->multiplier = coefficients.forget();
  step->clip_scale = clip_scale.read();
  step->one_minus_ema_decay = 1.0 - ema_decay;
  step->dither = Dither::at(*applied);
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

// Rounds and writes n parameters of tensor t, then EMA and copy, which follow them as they are stored.
template <int n, class P, class T, template <class> class Rule>
__device__ __forceinline__ void write_params(const UpdateBatch& batch, const Step<Rule>& step, const int64_t* key,
                                             int t, int64_t i, const T (&values)[n]) {
  auto* ema = static_cast<char*>(batch.data[kEma][t]);
  auto* copy = static_cast<char*>(batch.data[kCopy][t]);
  P rounded[n];
  round_params(key, batch.place[t], i, values, rounded);
  store(static_cast<P*>(batch.data[kParam][t]) + i, rounded);
  T stored[n];
#pragma unroll
  for (int k = 0; k < n; ++k) stored[k] = widen<T>(rounded[k]);
  if (copy) store_any(copy, batch.copy_dtype, i, stored);
  if (ema) {
    T average[n];
    load_any(ema, batch.ema_dtype, i, average);
#pragma unroll
    for (int k = 0; k < n; ++k) average[k] = moving_average(average[k], stored[k], T(step.one_minus_ema_decay));
    store_any(ema, batch.ema_dtype, i, average);
  }
}

template <class P, class M, class G, template <class> class Rule>
__global__ void __launch_bounds__(kThreads)
    constrained_update_kernel(const __grid_constant__ UpdateBatch batch, const Step<Rule>* step, const int64_t* key) {
  using T = Compute<P>;
  constexpr int kStates = Rule<T>::kStates;
  // Two doubles are 128 bits; four would spill.
  constexpr int kWide = sizeof(T) == 8 ? 2 : sizeof(P) < 4 || sizeof(M) < 4 || sizeof(G) < 4 ? 8 : 4;
  if (!step->finite) return;
  const Piece piece = piece_of_block(batch);
  const int t = piece.tensor;
  const auto* params = static_cast<const P*>(batch.data[kParam][t]);
  M* const states[2] = {static_cast<M*>(batch.data[kState0][t]), static_cast<M*>(batch.data[kState1][t])};
  const auto* retain = static_cast<const G*>(batch.data[kRetain][t]);
  const auto* forget = static_cast<const G*>(batch.data[kForget][t]);
  const auto* mask = static_cast<const uint8_t*>(batch.data[kMask][t]);
  const Rule<T> rule = step->template rule<T>();
  const Combine<T> combine{T(step->coefficient), T(step->multiplier), T(step->clip_scale)};

  const bool wide = aligned(params, states[0], states[1], retain, forget, batch.data[kEma][t], batch.data[kCopy][t]);
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

    write_params<n.value, P>(batch, *step, key, t, i, p);
#pragma unroll
    for (int j = 0; j < kStates; ++j) store_nearest(states[j] + i, s[j]);
  });
}

// The k-th of the `count` values from i on, and 0 beyond them; all at once where `whole`.
template <int n, class Stored>
__device__ __forceinline__ void load_some(const Stored* data, bool whole, int count, float (&values)[n]) {
  if (whole) return load(data, values);
#pragma unroll
  for (int k = 0; k < n; ++k) values[k] = k < count ? widen<float>(data[k]) : 0.0f;
}

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t bits) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) bits = larger_bits(bits, __shfl_xor_sync(0xffffffffu, bits, offset));
  return bits;
}

// A moment as codes: a warp has one block of them, a lane kCodes.
constexpr int kCodes = kMomentBlock / 32;

template <class Code>
struct Codes {
  using Stored = typename Code::Stored;

  Stored* codes;
  float* absmaxes;

  // Codes stay packed in two registers, four to each: as an array of bytes they would take eight.
  __device__ __forceinline__ void load(int64_t i, bool whole, int count, float (&values)[kCodes]) const {
    uint32_t words[2] = {};
    if (whole) {
      const uint2 word = read_word(reinterpret_cast<const uint2*>(codes + i));
      words[0] = word.x;
      words[1] = word.y;
    } else {
#pragma unroll
      for (int k = 0; k < kCodes; ++k) {
        if (k < count) words[k / 4] |= uint32_t(uint8_t(codes[i + k])) << 8 * (k % 4);
      }
    }
    const float absmax = count > 0 ? absmaxes[i / kMomentBlock] : 0.0f;
#pragma unroll
    for (int k = 0; k < kCodes; ++k) values[k] = Code::decode(Stored(words[k / 4] >> 8 * (k % 4)), absmax);
  }

  // Called by all lanes of a warp.
  __device__ __forceinline__ void store(int64_t i, bool whole, int count, Dither dither,
                                        const float (&values)[kCodes]) const {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kCodes; ++k) largest = larger_bits(largest, magnitude_bits(values[k]));
    const float absmax = float_of(largest_of_warp(largest)), inverse = inverse_of(absmax);
    uint32_t words[2] = {};
#pragma unroll
    for (int k = 0; k < kCodes; ++k) {
      const Stored code = Code::encode(values[k], inverse, dither(uint32_t(i) + k));
      words[k / 4] |= uint32_t(uint8_t(code)) << 8 * (k % 4);
    }
    if (whole) {
      write_word(reinterpret_cast<uint2*>(codes + i), uint2{words[0], words[1]});
    } else {
#pragma unroll
      for (int k = 0; k < kCodes; ++k) {
        if (k < count) codes[i + k] = Stored(words[k / 4] >> 8 * (k % 4));
      }
    }
    if (i % kMomentBlock == 0 && count > 0) absmaxes[i / kMomentBlock] = absmax;
  }
};

template <class P, class G, template <class> class Rule>
__global__ void __launch_bounds__(kThreads) constrained_update_codes_kernel(const __grid_constant__ UpdateBatch batch,
                                                                            const Step<Rule>* step,
                                                                            const int64_t* key) {
  if (!step->finite) return;
  const Piece piece = piece_of_block(batch);
  const int t = piece.tensor;
  const auto* params = static_cast<const P*>(batch.data[kParam][t]);
  const Codes<SignedCode> first{static_cast<int8_t*>(batch.data[kState0][t]),
                                static_cast<float*>(batch.data[kAbsmax0][t])};
  const Codes<UnsignedCode> second{static_cast<uint8_t*>(batch.data[kState1][t]),
                                   static_cast<float*>(batch.data[kAbsmax1][t])};
  const auto* retain = static_cast<const G*>(batch.data[kRetain][t]);
  const auto* forget = static_cast<const G*>(batch.data[kForget][t]);
  const auto* mask = static_cast<const uint8_t*>(batch.data[kMask][t]);
  const Rule<float> rule = step->float_rule;
  const Combine<float> combine{float(step->coefficient), float(step->multiplier), float(step->clip_scale)};

  const bool wide =
      aligned(params, first.codes, second.codes, retain, forget, batch.data[kEma][t], batch.data[kCopy][t]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t block = piece.first + warp * kMomentBlock; block < piece.end; block += kThreads * kCodes) {
    const int64_t i = block + lane * kCodes;
    const int count = piece.end - i < kCodes ? (piece.end > i ? int(piece.end - i) : 0) : kCodes;
    const bool whole = wide && count == kCodes;
    float p[kCodes], r[kCodes], g[kCodes] = {}, m[kCodes], v[kCodes];
    load_some(retain + i, whole, count, r);
    if (forget) load_some(forget + i, whole, count, g);
    load_some(params + i, whole, count, p);
    first.load(i, whole, count, m);
    second.load(i, whole, count, v);
    const uint32_t kept = mask && count > 0 ? mask_bits(mask, i) : ~0u;

#pragma unroll
    for (int k = 0; k < kCodes; ++k) {
      float new_p = p[k], state[2] = {m[k], v[k]};
      rule(new_p, state, forget ? combine(r[k], g[k]) : combine(r[k]));
      const bool keep = kept >> k & 1;
      p[k] = keep ? new_p : p[k];
      m[k] = keep && k < count ? state[0] : m[k];
      v[k] = keep && k < count ? state[1] : v[k];
    }

    first.store(i, whole, count, step->dither, m);
    second.store(i, whole, count, step->dither, v);
    if (whole) {
      write_params<kCodes, P>(batch, *step, key, t, i, p);
    } else {
#pragma unroll
      for (int k = 0; k < kCodes; ++k) {
        const float one[1] = {p[k]};
        if (k < count) write_params<1, P>(batch, *step, key, t, i + k, one);
      }
    }
  }
}

// Codes stand for the two moments of fp32, bf16 or fp16 parameters.
template <class P, class G, template <class> class Rule>
constexpr bool kHasCodesKernel =
    Rule<float>::kStates == 2 && !std::is_same_v<P, double> && !std::is_same_v<G, double>;

// The lists of a step. `states` holds as many lists as the rule has states; `absmaxes` as many where they are codes.
struct Lists {
  const std::vector<Tensor>& params;
  std::vector<const std::vector<Tensor>*> states, absmaxes;
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
  launch(prepare_step<Rule, Make>, 1, 1, make, Coefficients(multiplier), Scalar(clip_scale),
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
      batch.data[kAbsmax0 + s][k] = s < int(lists.absmaxes.size()) ? pointer(*lists.absmaxes[s], i) : nullptr;
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
    const auto launch_all = [&, &members = members](auto kernel) {
      for_each_batch<UpdateBatch>(
          members, [&](int64_t i) { return lists.params[i].numel(); }, fill,
          [&](const UpdateBatch& batch) { launch(kernel, batch.chunks(), kThreads, batch, step, key); });
    };
    with_dtype(std::get<0>(dtypes), [&, &dtypes = dtypes](auto p) {
      with_dtype(std::get<2>(dtypes), [&](auto g) {
        using P = decltype(p);
        using G = decltype(g);
        if (std::get<1>(dtypes) == ScalarType::Char) {
          if constexpr (kHasCodesKernel<P, G, Rule>)
            launch_all(constrained_update_codes_kernel<P, G, Rule>);
          else
            STD_TORCH_CHECK(false, "no kernel for 8-bit moments of parameters or gradients of this type");
          return;
        }
        with_dtype(std::get<1>(dtypes), [&](auto m) {
          using M = decltype(m);
          if constexpr (kHasKernel<P, M, G>)
            launch_all(constrained_update_kernel<P, M, G, Rule>);
          else
            STD_TORCH_CHECK(false, "no kernel for this combination of parameter, moment and gradient types");
        });
      });
    });
  }
}

}  // namespace erasediff::cuda
