// The random map of the package (the same as lowmem/ops/philox.py and triton_kernels/philox.py): Philox4x32-10
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by a 64-bit seed.
//
// Dropout: element (row, k) of a mask takes the 16-bit half k % 2 of word (k % 8) / 2 of the block at counter
// (k / 8, row, 0, child). It is kept where these 16 bits, unsigned, are >= threshold = round(p * 65536).
// Packed masks: bit k % 32 of the 32-bit word k / 32 of a row; the spare bits of a row's last word are 0.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lm {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr uint32_t kKeepNone = 65536u;                                // threshold that keeps nothing

struct Philox4 {
  uint32_t w[4];
};

LM_HD uint32_t mulhi32(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// Ten rounds at counter (c0, c1, c2, c3) under key (seed's low word, seed's high word).
LM_HD Philox4 philox4x32_10(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = mulhi32(kPhiloxM0, c0), lo0 = kPhiloxM0 * c0;
    const uint32_t hi1 = mulhi32(kPhiloxM1, c2), lo1 = kPhiloxM1 * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// Eight keep bits, bit i for element 8 * block + i of `row`.
LM_HD uint32_t keep_bits8(uint64_t seed, uint32_t block, uint32_t row, uint32_t child, uint32_t threshold) {
  const Philox4 r = philox4x32_10(seed, block, row, 0u, child);
  uint32_t bits = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((r.w[i] & 0xFFFFu) >= threshold) << (2 * i);
    bits |= static_cast<uint32_t>((r.w[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return bits;
}

// The packed word of elements 32 * word .. 32 * word + 31 of `row`; bits of columns >= cols are 0.
LM_HD uint32_t keep_word(uint64_t seed, uint32_t word, uint32_t row, uint32_t child, uint32_t threshold, int64_t cols) {
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 4; ++i) bits |= keep_bits8(seed, 4 * word + i, row, child, threshold) << (8 * i);
  const int64_t left = cols - 32 * static_cast<int64_t>(word);
  return left >= 32 ? bits : (left <= 0 ? 0u : bits & ((1u << left) - 1u));
}

// round(p * 65536), ties to even as Python's round, clamped to [0, 65536]. NaN gives 0.
LM_HD uint32_t keep_threshold(double p) {
  const double t = p * 65536.0;
  if (!(t > 0.0)) return 0u;
  if (t >= 65536.0) return kKeepNone;
  const uint32_t low = static_cast<uint32_t>(t);
  const double rest = t - low;
  return low + static_cast<uint32_t>(rest > 0.5 || (rest == 0.5 && (low & 1u)));
}

// 1 / (1 - p) for the probability that 16 bits can express; 0 where nothing is kept.
LM_HD double inv_keep(uint32_t threshold) { return threshold < kKeepNone ? 65536.0 / (kKeepNone - threshold) : 0.0; }

}  // namespace lm
