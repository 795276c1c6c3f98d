// The sorted entries are cut into pieces of equal size, whatever latents they belong to: some occur a thousand times as
// often as others. A latent whose entries lie within one piece is written there; the others are added up from their
// pieces, in order, by a second kernel. No atomics, and a fixed order.
#include <torch/csrc/stable/library.h>

#include "samples.cuh"

namespace erasediff::cuda {
namespace {

// Entries of a piece: one for each thread to look up.
constexpr int kPiece = kThreads;

// Rows that are on their way at the same time.
constexpr int kAhead = 4;

template <class Stored>
struct Entries {
  const Stored *values, *rows;
  const int64_t *order, *starts;
  int64_t count, latents, k, dim;

  // The latent that the sorted entry belongs to.
  __device__ __forceinline__ int64_t latent_of(int64_t entry) const {
    int64_t low = 0, high = latents;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle] <= entry)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

// Sums of latents that reach beyond their piece: two rows for each piece, one for the latent that comes from the piece
// before, one for a latent that begins here.
template <int n, class Stored, class T>
__global__ void __launch_bounds__(kThreads)
    scatter_pieces_kernel(const Entries<Stored> entries, Stored* outer, T* sums, int tiles) {
  __shared__ int64_t row_of[kPiece], latent_of[kPiece];
  __shared__ T value_of[kPiece];
  const int64_t piece = blockIdx.x / tiles, first = piece * kPiece;
  const int count = entries.count - first < kPiece ? int(entries.count - first) : kPiece;
  if (int(threadIdx.x) < count) {
    const int64_t position = entries.order[first + threadIdx.x];
    row_of[threadIdx.x] = position / entries.k * entries.dim;
    value_of[threadIdx.x] = widen<T>(entries.values[position]);
    latent_of[threadIdx.x] = entries.latent_of(first + threadIdx.x);
  }
  __syncthreads();
  const int64_t i = (int64_t(blockIdx.x % tiles) * kThreads + threadIdx.x) * n;
  if (i >= entries.dim) return;

  T sum[n] = {};
  const auto finish = [&](int64_t latent) {
    const bool from_before = entries.starts[latent]<first, goes_on = entries.starts[latent + 1]> first + count;
    if (from_before || goes_on)
      store_nearest(sums + (2 * piece + (from_before ? 0 : 1)) * entries.dim + i, sum);
    else
      store_nearest(outer + latent * entries.dim + i, sum);
#pragma unroll
    for (int c = 0; c < n; ++c) sum[c] = T(0);
  };
  int64_t latent = latent_of[0];
  for (int begin = 0; begin < count; begin += kAhead) {
    T columns[kAhead][n] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (begin + a < count) load(entries.rows + row_of[begin + a] + i, columns[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (begin + a >= count) break;
      if (latent_of[begin + a] != latent) {
        finish(latent);
        latent = latent_of[begin + a];
      }
#pragma unroll
      for (int c = 0; c < n; ++c) sum[c] += value_of[begin + a] * columns[a][c];
    }
  }
  finish(latent);
}

// Rows that no piece could write: latents that reach over several, and those without entries.
template <int n, class Stored, class T>
__global__ void __launch_bounds__(kThreads)
    scatter_seams_kernel(const Entries<Stored> entries, const T* sums, Stored* outer, int tiles) {
  const int64_t latent = blockIdx.x / tiles, begin = entries.starts[latent], end = entries.starts[latent + 1];
  const int64_t first = begin / kPiece, last = (end - 1) / kPiece;
  const int64_t i = (int64_t(blockIdx.x % tiles) * kThreads + threadIdx.x) * n;
  if (i >= entries.dim || (begin < end && first == last)) return;
  T sum[n] = {};
  for (int64_t piece = first; begin < end && piece <= last; ++piece) {
    T part[n];
    load(sums + (2 * piece + (piece > first ? 0 : 1)) * entries.dim + i, part);
#pragma unroll
    for (int c = 0; c < n; ++c) sum[c] += part[c];
  }
  store_nearest(outer + latent * entries.dim + i, sum);
}

template <int n, class Stored>
void scatter(const Launcher& launch, const Entries<Stored>& entries, const Tensor& like, Stored* outer) {
  using T = Compute<Stored>;
  const int64_t pieces = (entries.count + kPiece - 1) / kPiece;
  const int tiles = int((entries.dim + int64_t(kThreads) * n - 1) / (int64_t(kThreads) * n));
  const ScalarType dtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  Tensor sums = torch::stable::new_empty(like, {2 * pieces, entries.dim}, dtype);
  auto* partial = static_cast<T*>(sums.data_ptr());
  launch(scatter_pieces_kernel<n, Stored, T>, pieces * tiles, kThreads, entries, outer, partial, tiles);
  launch(scatter_seams_kernel<n, Stored, T>, entries.latents * tiles, kThreads, entries, static_cast<const T*>(partial),
         outer, tiles);
}

Tensor scatter_outer(const Tensor& values_any, const Tensor& rows_any, const Tensor& order_any,
                     const Tensor& starts_any) {
  const Tensor values = torch::stable::contiguous(values_any), rows = torch::stable::contiguous(rows_any);
  const Tensor order = torch::stable::contiguous(order_any), starts = torch::stable::contiguous(starts_any);
  const int64_t latents = starts.size(0) - 1, dim = rows.size(1);
  Tensor outer = torch::stable::new_empty(rows, {latents, dim});
  const Launcher launch(rows);
  with_dtype(rows.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    const Entries<Stored> entries{static_cast<const Stored*>(values.data_ptr()),
                                  static_cast<const Stored*>(rows.data_ptr()),
                                  static_cast<const int64_t*>(order.data_ptr()),
                                  static_cast<const int64_t*>(starts.data_ptr()),
                                  order.numel(),
                                  latents,
                                  values.size(1),
                                  dim};
    auto* result = static_cast<Stored*>(outer.data_ptr());
    const auto address = reinterpret_cast<uintptr_t>(entries.rows) | reinterpret_cast<uintptr_t>(result);
    if (dim % kWide<Stored> == 0 && address % 16 == 0)
      scatter<kWide<Stored>>(launch, entries, rows, result);
    else
      scatter<1>(launch, entries, rows, result);
  });
  return outer;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(erasediff_compiled, ERASEDIFF_DEVICE, m) {
  m.impl("scatter_outer", TORCH_BOX(&scatter_outer));
}

}  // namespace erasediff::cuda
