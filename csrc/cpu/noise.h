// Noise of one sample, drawn tile by tile into the first-level cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "../shared/philox.h"
#include "tile.h"

namespace erasediff::cpu {

// Streams of the noise of each sample, addressed by (sample_ids, key, role).
struct Streams {
  const int64_t* sample_ids = nullptr;
  const int64_t* key = nullptr;
  int64_t role = 0;

  Streams(const Tensor& sample_ids, const Tensor& key, int64_t role)
      : sample_ids(static_cast<const int64_t*>(sample_ids.data_ptr())),
        key(static_cast<const int64_t*>(key.data_ptr())),
        role(role) {}
  Streams() = default;

  ERASEDIFF_FN Philox of(int64_t sample) const { return Philox(key[0], key[1], sample_ids[sample], role); }
};

// The words of elements first .. first + n - 1, rounded up to whole blocks; `first` is a multiple of 4.
ERASEDIFF_FN void draw_words(const Philox& philox, int64_t first, int64_t n, uint32_t* words) {
  const uint32_t first_block = uint32_t(first / 4);
  for (int64_t block = 0; block < (n + 3) / 4; ++block) {
    const Words drawn = philox.block(first_block + uint32_t(block));
    for (int lane = 0; lane < 4; ++lane) words[4 * block + lane] = drawn.word[lane];
  }
}

// Noise of elements first .. first + n - 1, n <= kTile, into `noise`, which has room for whole blocks.
template <class T>
ERASEDIFF_FN void draw(const Philox& philox, bool gaussian, int64_t first, int64_t n, T* noise) {
  uint32_t words[kTile];
  draw_words(philox, first, n, words);
  if (gaussian) {
    for (int64_t pair = 0; pair < (n + 1) / 2; ++pair) {
      const Pair drawn = normal(words[2 * pair], words[2 * pair + 1]);
      noise[2 * pair] = T(drawn.even);
      noise[2 * pair + 1] = T(drawn.odd);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) noise[i] = T(uniform(words[i]));
  }
}

// Noise that is either given as a tensor or drawn.
struct Noise {
  Flat given;
  Streams streams;
  bool gaussian = true;

  Noise(const std::optional<Tensor>& noise, const std::optional<Tensor>& sample_ids, const std::optional<Tensor>& key,
        int64_t role, bool gaussian)
      : gaussian(gaussian) {
    if (noise) given = Flat(*noise);
    if (!noise && sample_ids && key) streams = Streams(*sample_ids, *key, role);
  }

  // Elements first .. first + n - 1 of a sample of `numel` elements.
  template <class T>
  ERASEDIFF_FN const T* read(int64_t sample, int64_t numel, int64_t first, int64_t n, T* buffer) const {
    if (given.data) return load(given, sample * numel + first, n, buffer);
    draw(streams.of(sample), gaussian, first, n, buffer);
    return buffer;
  }
};

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

}  // namespace erasediff::cpu
