// Basics of every CUDA operator: the stream, wide loads and stores, and sums in a fixed order.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../shared/half.h"
#include "../shared/portable.h"

namespace erasediff::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

#if defined(__CUDACC__)
#define ERASEDIFF_DEVICE CUDA
#else  // tests/kernels/emulator runs the kernels on the CPU
#define ERASEDIFF_DEVICE CPU
#endif

// Launches kernels on the device and the current stream of a tensor.
class Launcher {
 public:
#if defined(__CUDACC__)
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) return;
    kernel<<<blocks, threads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#else
  explicit Launcher(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    emulator::run(blocks, threads, [&] { kernel(arguments...); });
  }
#endif
};

// Calls f(Stored()) for the element type of a dtype.
template <class F>
void with_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(bf16());
    case ScalarType::Half:
      return f(fp16());
    case ScalarType::Double:
      return f(double());
    default:
      STD_TORCH_CHECK(false, "no kernel for this dtype");
  }
}

// The type that arithmetic on `Stored` is done in.
template <class Stored>
using Compute = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

// Words that values are moved in. Plain assignments of uint4 get split where branches come near them (a square root has
// some); the intrinsics do not. They bypass the first-level cache, which is of no use here.
template <class Word>
__device__ __forceinline__ Word read_word(const Word* word) {
  if constexpr (std::is_same_v<Word, uint4> || std::is_same_v<Word, uint2>) return __ldcg(word);
  return *word;
}

template <class Word>
__device__ __forceinline__ void write_word(Word* word, Word value) {
  if constexpr (std::is_same_v<Word, uint4> || std::is_same_v<Word, uint2>)
    __stcg(word, value);
  else
    *word = value;
}

// n values as words of up to 16 bytes.
template <class Stored, int n>
struct Pack {
  static constexpr int kBytes = n * sizeof(Stored);
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes % 8 == 0, uint2, Stored>>;
  static constexpr int kWords = kBytes / sizeof(Word);

  Word words[kWords];
};

template <int n, class Stored, class T>
__device__ __forceinline__ void load(const Stored* data, T (&values)[n]) {
  using Packed = Pack<Stored, n>;
  Packed pack;
#pragma unroll
  for (int w = 0; w < Packed::kWords; ++w) {
    pack.words[w] = read_word(reinterpret_cast<const typename Packed::Word*>(data) + w);
  }
  Stored stored[n];
  memcpy(stored, pack.words, sizeof stored);
#pragma unroll
  for (int k = 0; k < n; ++k) values[k] = widen<T>(stored[k]);
}

template <int n, class Stored>
__device__ __forceinline__ void store(Stored* data, const Stored (&values)[n]) {
  using Packed = Pack<Stored, n>;
  Packed pack;
  memcpy(pack.words, values, sizeof values);
#pragma unroll
  for (int w = 0; w < Packed::kWords; ++w) {
    write_word(reinterpret_cast<typename Packed::Word*>(data) + w, pack.words[w]);
  }
}

template <int n, class Stored, class T>
__device__ __forceinline__ void store_nearest(Stored* data, const T (&values)[n]) {
  Stored narrowed[n];
#pragma unroll
  for (int k = 0; k < n; ++k) narrowed[k] = narrow<Stored>(values[k]);
  store(data, narrowed);
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Shares the elements first .. end - 1 out to the threads of a block: f(Count<n>(), i) takes n of them from i on, and
// f(Count<1>(), i) takes one, at the end or wherever `wide` is false.
template <int n, class F>
__device__ __forceinline__ void for_each_element(int64_t first, int64_t end, bool wide, const F& f) {
  const int64_t wide_end = wide ? end - (end - first) % n : first;
  for (int64_t i = first + threadIdx.x * n; i < wide_end; i += kThreads * n) f(Count<n>(), i);
  for (int64_t i = wide_end + threadIdx.x; i < end; i += kThreads) f(Count<1>(), i);
}

// Whether every pointer allows 16-byte accesses. Null pointers do.
template <class... Pointers>
__device__ __forceinline__ bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// The sum over the threads of a block, in a fixed order; valid in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) total += warps[warp];
  return total;
}

// The second stage of a reduction: column `blockIdx.x` of partials[rows][columns], by one block.
template <class Result>
__global__ void __launch_bounds__(kThreads)
    sum_columns(const double* partials, int64_t rows, int columns, Result* sums) {
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) sum += partials[row * columns + blockIdx.x];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = Result(sum);
}

}  // namespace erasediff::cuda
