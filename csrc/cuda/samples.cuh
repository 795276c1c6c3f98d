// Launches over a batch of samples, and the noise of their elements.
#pragma once

#include <optional>
#include <string>

#include "../shared/philox.h"
#include "device.cuh"

namespace erasediff::cuda {

// B samples of `numel` elements, each cut into the same chunks; one block works on one chunk.
struct Samples {
  static constexpr int64_t kChunk = 1 << 13;

  int64_t batch, numel, chunks;

  Samples(int64_t batch, int64_t numel) : batch(batch), numel(numel), chunks((numel + kChunk - 1) / kChunk) {}
  int64_t blocks() const { return batch * chunks; }

  // The piece of this block: elements first .. end - 1 of a sample.
  struct Piece {
    int64_t sample, first, end;
  };
  __device__ __forceinline__ Piece piece() const {
    const int64_t sample = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
    return {sample, first, first + kChunk < numel ? first + kChunk : numel};
  }
};

inline Samples samples_of(const Tensor& tensor) {
  const int64_t batch = tensor.size(0);
  return Samples(batch, batch ? tensor.numel() / batch : 0);
}

// The streams of (sample_ids, key, role).
struct Streams {
  const int64_t *sample_ids = nullptr, *key = nullptr;
  int role = 0;

  __device__ __forceinline__ Philox of(int64_t sample) const {
    return Philox(key[0], key[1], sample_ids[sample], role);
  }
};

inline Streams make_streams(const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& key, int64_t role) {
  if (!sample_ids || !key) return {};
  return {static_cast<const int64_t*>(sample_ids->data_ptr()), static_cast<const int64_t*>(key->data_ptr()), int(role)};
}

// n noise values from element i on; n is 1 or a multiple of 4, and then so is i.
template <int n, class T>
__device__ __forceinline__ void draw(const Philox& philox, bool gaussian, int64_t i, T (&noise)[n]) {
#pragma unroll
  for (int k = 0; k < n; k += 4) {
    const Words words = philox.block(uint32_t((i + k) / 4));
    if constexpr (n == 1) {
      const Pair pair = normal(words.at(i & ~int64_t(1)), words.at(i | 1));
      noise[0] = T(gaussian ? (i & 1 ? pair.odd : pair.even) : uniform(words.at(i)));
    } else if (gaussian) {
#pragma unroll
      for (int lane = 0; lane < 4; lane += 2) {
        const Pair pair = normal(words.word[lane], words.word[lane + 1]);
        noise[k + lane] = T(pair.even);
        noise[k + lane + 1] = T(pair.odd);
      }
    } else {
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) noise[k + lane] = T(uniform(words.word[lane]));
    }
  }
}

// Noise that is either given or drawn.
template <class Stored>
struct Noise {
  const Stored* given = nullptr;
  Streams streams;
  bool gaussian = true;

  template <int n, class T>
  __device__ __forceinline__ void read(int64_t sample, int64_t numel, int64_t i, T (&noise)[n]) const {
    if (given)
      load(given + sample * numel + i, noise);
    else
      draw(streams.of(sample), gaussian, i, noise);
  }
};

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// In the type of the data that it goes with.
inline std::optional<Tensor> contiguous_like(const std::optional<Tensor>& tensor, const Tensor& like) {
  if (!tensor) return std::nullopt;
  const bool same = tensor->scalar_type() == like.scalar_type();
  return torch::stable::contiguous(same ? *tensor : torch::stable::to(*tensor, like.scalar_type()));
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// Elements that a thread takes at a time: 16 bytes, and whole blocks of Philox.
template <class Stored>
constexpr int kWide = sizeof(Stored) < 4 ? 8 : 4;

}  // namespace erasediff::cuda
