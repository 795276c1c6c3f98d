// One block per row. A radix selection finds the last key that is kept, eight bits per pass; the kept ones are then
// gathered in any order and put in theirs by counting. A key is an activation and, below it, the inverted index: no two
// are equal, so exactly k are kept and their order is unique.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../shared/topk.h"
#include "device.cuh"

namespace erasediff::cuda {
namespace {

constexpr int kDigits = 256;
constexpr int kLargest = 1024;  // LARGEST_K in ops/topk_encode.py
static_assert(kDigits == kThreads);

template <class T>
struct Key {
  Bits<T> bits;
  uint32_t inverted;

  static constexpr int kDigitsOfBits = sizeof(Bits<T>), kPasses = kDigitsOfBits + sizeof(uint32_t);

  __device__ __forceinline__ bool operator>(const Key& other) const {
    return bits != other.bits ? bits > other.bits : inverted > other.inverted;
  }
  // Digit 0 is the most significant one.
  __device__ __forceinline__ int digit(int pass) const {
    return pass < kDigitsOfBits ? int(bits >> 8 * (kDigitsOfBits - 1 - pass) & 255)
                                : int(inverted >> 8 * (kPasses - 1 - pass) & 255);
  }
  __device__ __forceinline__ void set_digit(int pass, int digit) {
    if (pass < kDigitsOfBits)
      bits |= Bits<T>(digit) << 8 * (kDigitsOfBits - 1 - pass);
    else
      inverted |= uint32_t(digit) << 8 * (kPasses - 1 - pass);
  }
  // Whether the digits before `pass` are those of another key.
  __device__ __forceinline__ bool begins_as(const Key& other, int pass) const {
    if (pass == 0) return true;
    if (pass <= kDigitsOfBits) return (bits ^ other.bits) >> 8 * (kDigitsOfBits - pass) == 0;
    return bits == other.bits && (inverted ^ other.inverted) >> 8 * (kPasses - pass) == 0;
  }
};

template <class Stored>
__device__ __forceinline__ Key<Compute<Stored>> key_of(Stored x, int64_t index) {
  return {activation_bits(widen<Compute<Stored>>(x)), ~uint32_t(index)};
}

// The k-th largest key of a row, or a smaller one that none lies between: all threads of the block return it.
template <class Stored>
__device__ __forceinline__ Key<Compute<Stored>> last_kept(const Stored* row, int64_t latents, int k) {
  using T = Compute<Stored>;
  __shared__ int at_least[kDigits + 1];
  __shared__ int chosen, above;
  Key<T> last = {0, 0};
  int wanted = k;
  for (int pass = 0; pass < Key<T>::kPasses; ++pass) {
    at_least[threadIdx.x] = 0;
    if (threadIdx.x == 0) at_least[kDigits] = 0;
    __syncthreads();
    // Half of all activations are zero: they are not counted, since digit 0 is what remains.
    for (int64_t i = threadIdx.x; i < latents; i += kThreads) {
      const Key<T> key = key_of(row[i], i);
      const int digit = key.digit(pass);
      if (digit > 0 && key.begins_as(last, pass)) atomicAdd(&at_least[digit], 1);
    }
    __syncthreads();
    for (int step = 1; step < kDigits; step *= 2) {
      const int other = int(threadIdx.x) + step < kDigits ? at_least[threadIdx.x + step] : 0;
      __syncthreads();
      at_least[threadIdx.x] += other;
      __syncthreads();
    }
    const int digit = threadIdx.x;
    const bool enough = digit == 0 || at_least[digit] >= wanted;
    if (enough && at_least[digit + 1] < wanted) {
      chosen = digit;
      above = at_least[digit + 1];
    }
    __syncthreads();
    last.set_digit(pass, chosen);
    const bool done = chosen > 0 && at_least[chosen] == wanted;
    wanted -= above;
    __syncthreads();
    if (done) break;
  }
  return last;
}

template <class Stored>
__global__ void __launch_bounds__(kThreads)
    topk_encode_kernel(const Stored* preactivations, Stored* values, int32_t* indices, int64_t latents, int k) {
  using T = Compute<Stored>;
  const int64_t begin = blockIdx.x;
  const Stored* row = preactivations + begin * latents;
  const Key<T> last = last_kept(row, latents, k);
  __shared__ Key<T> kept[kLargest];
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < latents; i += kThreads) {
    const Key<T> key = key_of(row[i], i);
    if (!(last > key)) kept[atomicAdd(&count, 1)] = key;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < k; j += kThreads) {
    const Key<T> mine = kept[j];
    int rank = 0;
    for (int other = 0; other < k; ++other) rank += kept[other] > mine;
    const uint32_t index = ~mine.inverted;
    values[begin * k + rank] = activation(row[index]);
    indices[begin * k + rank] = int32_t(index);
  }
}

std::tuple<Tensor, Tensor> topk_encode(const Tensor& preactivations_any, int64_t k) {
  const Tensor preactivations = torch::stable::contiguous(preactivations_any);
  const int64_t count = preactivations.size(0), latents = preactivations.size(1);
  STD_TORCH_CHECK(k <= kLargest, "k is ", k, ", but at most ", kLargest, " are kept");
  Tensor values = torch::stable::new_empty(preactivations, {count, k});
  Tensor indices = torch::stable::new_empty(preactivations, {count, k}, ScalarType::Int);
  const Launcher launch(preactivations);
  with_dtype(preactivations.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    launch(topk_encode_kernel<Stored>, count, kThreads, static_cast<const Stored*>(preactivations.data_ptr()),
           static_cast<Stored*>(values.data_ptr()), static_cast<int32_t*>(indices.data_ptr()), latents, int(k));
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) { m.impl("topk_encode", TORCH_BOX(&topk_encode)); }

}  // namespace erasediff::cuda
