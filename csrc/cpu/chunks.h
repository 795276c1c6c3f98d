// Work over a list of tensors is cut into chunks at fixed places and shared out by elements, so that one large tensor
// and thousands of small ones keep all threads busy, and what a chunk computes does not depend on how many there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace erasediff::cpu {

constexpr int64_t kChunk = 1 << 15;

// Fewer elements than this are not worth waking another thread for.
constexpr int64_t kGrain = 1 << 14;

class Chunks {
 public:
  // `sizes(i)` is the number of elements of tensor i.
  template <class Sizes>
  Chunks(int64_t tensors, const Sizes& sizes) : first_element_(tensors + 1), first_chunk_(tensors + 1) {
    for (int64_t i = 0; i < tensors; ++i) {
      first_element_[i + 1] = first_element_[i] + sizes(i);
      first_chunk_[i + 1] = first_chunk_[i] + (sizes(i) + kChunk - 1) / kChunk;
    }
  }

  int64_t count() const { return first_chunk_.back(); }

  // Calls f(chunk, tensor, first, size) for every chunk: elements first .. first + size - 1 of the tensor. A chunk goes
  // to the thread whose share of all elements holds its first one.
  template <class F>
  void for_each(const F& f) const {
    const int64_t total = first_element_.back();
    torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
      int64_t tensor =
          std::upper_bound(first_element_.begin(), first_element_.end(), begin) - first_element_.begin() - 1;
      int64_t local = (begin - first_element_[tensor] + kChunk - 1) / kChunk;
      for (; first_element_[tensor] < end && begin < total; ++tensor, local = 0) {
        const int64_t size = first_element_[tensor + 1] - first_element_[tensor];
        for (int64_t first = local * kChunk; first < std::min(size, end - first_element_[tensor]); first += kChunk) {
          f(first_chunk_[tensor] + first / kChunk, tensor, first, std::min(kChunk, size - first));
        }
      }
    });
  }

 private:
  std::vector<int64_t> first_element_, first_chunk_;
};

}  // namespace erasediff::cpu
