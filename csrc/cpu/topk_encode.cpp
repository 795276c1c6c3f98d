// One pass over a row with the k largest so far in a heap, the smallest of them on top: nearly all other values are
// turned away by one comparison.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../shared/topk.h"
#include "rows.h"

namespace erasediff::cpu {
namespace {

template <class T>
struct Candidate {
  Bits<T> bits;
  int32_t index;

  // Whether it goes before another; as the order of a heap it puts the last of all on top.
  bool operator<(const Candidate& other) const {
    return bits != other.bits ? bits > other.bits : index < other.index;
  }
};

template <class T, class Stored>
void encode_row(const Stored* row, int64_t latents, int64_t k, std::vector<Candidate<T>>& heap, Stored* values,
                int32_t* indices) {
  heap.clear();
  for (int64_t i = 0; i < k; ++i) heap.push_back({activation_bits(widen<T>(row[i])), int32_t(i)});
  std::make_heap(heap.begin(), heap.end());
  for (int64_t i = k; i < latents; ++i) {
    const Bits<T> bits = activation_bits(widen<T>(row[i]));
    // Of equal values the earlier one stays.
    if (bits <= heap.front().bits) continue;
    std::pop_heap(heap.begin(), heap.end());
    heap.back() = {bits, int32_t(i)};
    std::push_heap(heap.begin(), heap.end());
  }
  std::sort_heap(heap.begin(), heap.end());
  for (int64_t j = 0; j < k; ++j) {
    values[j] = activation(row[heap[j].index]);
    indices[j] = heap[j].index;
  }
}

template <class T, class Stored>
void encode(const Tensor& preactivations, int64_t k, const Tensor& values, const Tensor& indices) {
  const int64_t count = preactivations.size(0), latents = preactivations.size(1);
  const auto* from = static_cast<const Stored*>(preactivations.data_ptr());
  auto* value = static_cast<Stored*>(values.data_ptr());
  auto* index = static_cast<int32_t*>(indices.data_ptr());
  torch::stable::parallel_for(0, count, kRowsGrain / (latents + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate<T>> heap;
    heap.reserve(k);
    for (int64_t row = begin; row < end; ++row)
      encode_row(from + row * latents, latents, k, heap, value + row * k, index + row * k);
  });
}

std::tuple<Tensor, Tensor> topk_encode(const Tensor& preactivations_any, int64_t k) {
  const Tensor preactivations = torch::stable::contiguous(preactivations_any);
  Tensor values = torch::stable::new_empty(preactivations, {preactivations.size(0), k});
  Tensor indices = torch::stable::new_empty(preactivations, {preactivations.size(0), k}, ScalarType::Int);
  switch (preactivations.scalar_type()) {
    case ScalarType::Double:
      encode<double, double>(preactivations, k, values, indices);
      break;
    case ScalarType::BFloat16:
      encode<float, bf16>(preactivations, k, values, indices);
      break;
    case ScalarType::Half:
      encode<float, fp16>(preactivations, k, values, indices);
      break;
    default:
      encode<float, float>(preactivations, k, values, indices);
  }
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, CPU, m) { m.impl("topk_encode", TORCH_BOX(&topk_encode)); }

}  // namespace erasediff::cpu
