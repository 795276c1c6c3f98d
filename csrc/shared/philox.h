// Philox4x32-10 (Salmon et al., SC 2011) and its transforms to noise: bit for bit reference/philox.py, whose order of
// operations is normative. Compile with FMA contraction off.
#pragma once

#include "portable.h"

namespace erasediff {

struct Words {
  uint32_t word[4];

  // By selection, not by address: an index that is not a constant would send the words to memory.
  ERASEDIFF_FN uint32_t at(int64_t element) const {
    const uint32_t low = element & 1 ? word[1] : word[0], high = element & 1 ? word[3] : word[2];
    return element & 2 ? high : low;
  }
};

// The stream of one sample: everything of key and counter but the block.
struct Philox {
  uint32_t key0, key1, counter1, counter2, counter3;

  ERASEDIFF_FN Philox(int64_t seed, int64_t step, int64_t sample_id, int64_t role)
      : key0(uint32_t(seed)),
        key1(uint32_t(uint64_t(seed) >> 32)),
        counter1(uint32_t(sample_id)),
        counter2(uint32_t(step)),
        counter3(uint32_t(role & 0xff) << 24 | (uint32_t(uint64_t(sample_id) >> 32) & 0xffffffu)) {}

  // The words of elements 4 block .. 4 block + 3.
  ERASEDIFF_FN Words block(uint32_t block) const {
    uint32_t c0 = block, c1 = counter1, c2 = counter2, c3 = counter3, k0 = key0, k1 = key1;
    ERASEDIFF_UNROLL
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * c0;
      const uint64_t product1 = uint64_t(0xCD9E8D57u) * c2;
      c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(product1);
      c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

ERASEDIFF_FN float uniform(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

ERASEDIFF_FN float natural_logarithm(float u) {
  const int32_t bits = int32_t(bits_of(u));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = float_of(uint32_t(bits) - (uint32_t(exponent) << 23)) - 1.0f;
  const float k = float(exponent);
  const float z = f * f;
  float y = f * -0.0763694048f + 0.127624854f;
  y = y * f + -0.131595507f;
  y = y * f + 0.142015398f;
  y = y * f + -0.166234106f;
  y = y * f + 0.200012431f;
  y = y * f + -0.250008196f;
  y = y * f + 0.333333313f;
  y = y * f * z;
  y = y + k * -2.12194442e-4f;
  y = y - z * 0.5f;
  y = f + y;
  return y + k * 0.693359375f;
}

struct Pair {
  float even, odd;
};

// Box-Muller on the words of an even element and the odd one after it.
ERASEDIFF_FN Pair normal(uint32_t even_word, uint32_t odd_word) {
  const float u = float(even_word) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrtf(natural_logarithm(u) * -2.0f);
  const int32_t turn = int32_t(odd_word >> 8);
  const int32_t quadrant = (turn + (1 << 21)) >> 22;
  const float y = float(turn - (quadrant << 22)) * 0x1p-22f;
  const float z = y * y;
  float sine = z * -0.00468387362f + 0.07971178f;
  sine = sine * z + -0.645966589f;
  sine = sine * z + 1.57079637f;
  sine = sine * y;
  float cosine = z * 0.000894486264f + -0.0208555963f;
  cosine = cosine * z + 0.253668547f;
  cosine = cosine * z + -1.23370051f;
  cosine = cosine * z + 1.0f;
  const bool swap = quadrant & 1;
  const float cos_turn = swap ? sine : cosine;
  const float sin_turn = swap ? cosine : sine;
  const uint32_t cos_sign = uint32_t(quadrant + 1) >> 1 << 31;
  const uint32_t sin_sign = uint32_t(quadrant) >> 1 << 31;
  return {radius * float_of(bits_of(cos_turn) ^ cos_sign), radius * float_of(bits_of(sin_turn) ^ sin_sign)};
}

}  // namespace erasediff
