// Codes of 2, 3, 4 and 8 bits in bytes, and what an affine code is worth. The same as lowmem/quant/formats.py; the
// layout byte by byte is in docs/quant.md.
//
//   8, 4, 2 bits: the first element of a byte in its highest bits.
//   3 bits: granules of 32 elements in three little-endian 32-bit words; bit i of word p is bit p of element i. A row
//   (or a flat weight) starts at a granule.
//
// Every function takes the first byte of a run of elements (a packed row, or a whole flat weight) and an index in it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lm {

constexpr int kGranule = 32;  // elements of a 3-bit granule: 12 bytes

// Bytes of `count` packed codes.
LM_HD int64_t row_bytes(int bits, int64_t count) {
  return bits == 3 ? 12 * ((count + kGranule - 1) / kGranule) : (count * bits + 7) / 8;
}

template <int kBits>
LM_HD uint32_t code_at(const uint8_t* packed, int64_t i) {
  static_assert(kBits == 2 || kBits == 3 || kBits == 4 || kBits == 8, "codes have 2, 3, 4 or 8 bits");
  if constexpr (kBits == 8) {
    return packed[i];
  } else if constexpr (kBits == 3) {
    const uint8_t* byte = packed + 12 * (i / kGranule) + i % kGranule / 8;
    const int bit = static_cast<int>(i % 8);
    return (byte[0] >> bit & 1u) | (byte[4] >> bit & 1u) << 1 | (byte[8] >> bit & 1u) << 2;
  } else {
    constexpr int kPer = 8 / kBits;
    return packed[i / kPer] >> (8 - kBits - kBits * static_cast<int>(i % kPer)) & ((1u << kBits) - 1u);
  }
}

LM_HD uint32_t code_at(int bits, const uint8_t* packed, int64_t i) {
  switch (bits) {
    case 2: return code_at<2>(packed, i);
    case 3: return code_at<3>(packed, i);
    case 4: return code_at<4>(packed, i);
    default: return code_at<8>(packed, i);
  }
}

// The 32 codes of a granule from its three words: element i of `codes`. One plane at a time, so that a compiler (or a
// thread with the three words in registers) needs no byte access.
LM_HD uint32_t granule_code(uint32_t word0, uint32_t word1, uint32_t word2, int i) {
  return (word0 >> i & 1u) | (word1 >> i & 1u) << 1 | (word2 >> i & 1u) << 2;
}

// Sets the code of an element whose bits are all zero.
LM_HD void put_code(int bits, uint8_t* packed, int64_t i, uint32_t code) {
  if (bits == 3) {
    uint8_t* byte = packed + 12 * (i / kGranule) + i % kGranule / 8;
    for (int p = 0; p < 3; ++p) byte[4 * p] = static_cast<uint8_t>(byte[4 * p] | (code >> p & 1u) << (i % 8));
    return;
  }
  const int per = 8 / bits;
  uint8_t& byte = packed[i / per];
  byte = static_cast<uint8_t>(byte | code << (8 - bits - bits * static_cast<int>(i % per)));
}

// Products and sums that are rounded one by one, as torch rounds them: a compiler would otherwise fuse them.
LM_HD float mul_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

LM_HD float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// scale * (code - zero); without a zero point zero is the middle code 2**(bits - 1).
LM_HD float affine_value(uint32_t code, float zero, float scale) {
  return mul_rounded(static_cast<float>(code) - zero, scale);
}

}  // namespace lm
