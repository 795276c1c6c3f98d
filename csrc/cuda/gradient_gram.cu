// (rr, rf, ff) in one read of both gradients: fp64 sums per thread, per block, and then over the blocks, always in the
// same order.
#include <torch/csrc/stable/library.h>

#include <map>

#include "../lists.h"
#include "multi_tensor.cuh"

namespace erasediff::cuda {
namespace {

enum Stream { kRetain, kForget, kMask, kStreams };
using GramBatch = Batch<kStreams>;

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    gradient_gram_kernel(const __grid_constant__ GramBatch batch, double* partials) {
  using T = Compute<Stored>;
  const Piece piece = piece_of_block(batch);
  const auto* retain = static_cast<const Stored*>(batch.data[kRetain][piece.tensor]);
  const auto* forget = static_cast<const Stored*>(batch.data[kForget][piece.tensor]);
  const auto* mask = static_cast<const uint8_t*>(batch.data[kMask][piece.tensor]);
  double rr = 0.0, rf = 0.0, ff = 0.0;
  for_each_element<sizeof(Stored) < 4 ? 8 : 4>(piece.first, piece.end, aligned(retain, forget), [&](auto n, int64_t i) {
    T r[n.value], g[n.value] = {};
    load(retain + i, r);
    if (forget) load(forget + i, g);
    const uint32_t kept = mask ? mask_bits(mask, i) : ~0u;
#pragma unroll
    for (int k = 0; k < n.value; ++k) {
      const bool keep = kept >> k & 1;
      const double x = keep ? r[k] : T(0), y = keep ? g[k] : T(0);
      rr = fma(x, x, rr);
      rf = fma(x, y, rf);
      ff = fma(y, y, ff);
    }
  });
  rr = block_sum(rr);
  rf = block_sum(rf);
  ff = block_sum(ff);
  if (threadIdx.x == 0) {
    partials[3 * blockIdx.x] = rr;
    partials[3 * blockIdx.x + 1] = rf;
    partials[3 * blockIdx.x + 2] = ff;
  }
}

// The two gradients of a tensor in one type. Only gradients of different types are copied.
Tensor converted(const Tensor& tensor, const Tensor& other) {
  const ScalarType a = tensor.scalar_type(), b = other.scalar_type();
  if (a == b) return tensor;
  const bool wide = a == ScalarType::Double || b == ScalarType::Double;
  const ScalarType common = wide ? ScalarType::Double : ScalarType::Float;
  return a == common ? tensor : torch::stable::to(tensor, common);
}

std::optional<Tensor> gradient_gram(const TensorList& retain, const TensorList& forget, const TensorList& masks) {
  if (!gram_lists_are_valid(retain, forget, masks)) return std::nullopt;
  const Launcher launch(retain[0]);
  const size_t count = retain.size();
  std::vector<Tensor> retains(retain), forgets(forget);
  std::map<ScalarType, std::vector<int64_t>> groups;
  int64_t chunks = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!forget.empty()) {
      retains[i] = converted(retain[i], forget[i]);
      forgets[i] = converted(forget[i], retain[i]);
    }
    groups[retains[i].scalar_type()].push_back(i);
    chunks += (retain[i].numel() + kChunk - 1) / kChunk;
  }
  Tensor result = torch::stable::new_empty(retain[0], {3}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(retain[0], {chunks, 3}, ScalarType::Double);
  double* next = static_cast<double*>(partials.data_ptr());
  const auto fill = [&](GramBatch& batch, int64_t i) {
    batch.data[kRetain][batch.count] = retains[i].data_ptr();
    batch.data[kForget][batch.count] = forget.empty() ? nullptr : forgets[i].data_ptr();
    batch.data[kMask][batch.count] = masks.empty() ? nullptr : masks[i].data_ptr();
  };
  for (const auto& [dtype, members] : groups) {
    with_dtype(dtype, [&](auto stored) {
      for_each_batch<GramBatch>(
          members, [&](int64_t i) { return retain[i].numel(); }, fill,
          [&](const GramBatch& batch) {
            launch(gradient_gram_kernel<decltype(stored)>, batch.chunks(), kThreads, batch, next);
            next += 3 * batch.chunks();
          });
    });
  }
  launch(sum_columns<double>, 3, kThreads, static_cast<const double*>(partials.data_ptr()), chunks, 3,
         static_cast<double*>(result.data_ptr()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("gradient_gram", TORCH_BOX(&gradient_gram));
}

}  // namespace erasediff::cuda
