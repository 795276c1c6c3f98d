// One launch over a list of tensors. Their pointers travel in the kernel argument, so nothing is copied to the device
// and a launch can be captured in a graph. Each block works on one chunk of one tensor.
#pragma once

#include <vector>

#include "device.cuh"

namespace erasediff::cuda {

constexpr int64_t kChunk = 1 << 14;

template <int streams>
struct Batch {
  // A kernel argument may have 32764 bytes.
  static constexpr int kCapacity = 32000 / (8 * streams + 16);

  void* data[streams][kCapacity];
  int64_t size[kCapacity];
  int32_t place[kCapacity];  // in the caller's list
  uint32_t first_chunk[kCapacity + 1] = {0};
  int32_t count = 0;

  void add(int64_t index, int64_t numel) {
    size[count] = numel;
    place[count] = int32_t(index);
    first_chunk[count + 1] = first_chunk[count] + uint32_t((numel + kChunk - 1) / kChunk);
    ++count;
  }
  uint32_t chunks() const { return first_chunk[count]; }
};

// Calls launch(batch) for as few batches as hold `members`, indices into a list; `fill(batch, index)` sets the pointers
// of the tensor that is added next. Empty tensors are left out.
template <class Batch, class Sizes, class Fill, class Launch>
void for_each_batch(const std::vector<int64_t>& members, const Sizes& sizes, const Fill& fill, const Launch& launch) {
  Batch batch;
  for (const int64_t index : members) {
    if (sizes(index) == 0) continue;
    fill(batch, index);
    batch.add(index, sizes(index));
    if (batch.count < Batch::kCapacity) continue;
    launch(batch);
    batch = Batch();
  }
  if (batch.count > 0) launch(batch);
}

// The piece of work of this block.
struct Piece {
  int tensor;
  int64_t first, end;
};

template <class Batch>
__device__ __forceinline__ Piece piece_of_block(const Batch& batch) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_chunk[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  const int64_t first = int64_t(blockIdx.x - batch.first_chunk[low]) * kChunk;
  const int64_t size = batch.size[low];
  return {low, first, first + kChunk < size ? first + kChunk : size};
}

// The bits of a packed mask from element i on, a multiple of 4 or the only one that is used.
__device__ __forceinline__ uint32_t mask_bits(const uint8_t* mask, int64_t i) { return mask[i / 8] >> (i % 8); }

}  // namespace erasediff::cuda
