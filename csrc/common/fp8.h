// FP8 E4M3 (finite, no infinities: the "fn" variant) and its groups, one definition for host and device.
//
// A group of 128 neighbours of a row shares a scale 2^e, stored as the byte e + 127 (OCP MX's E8M0): the smallest power
// of two for which the group's largest finite magnitude is at most 448 after division. Scaling by powers of two is
// exact, so every backend makes the same bits. NaN and infinities are stored as NaN and do not count for the scale.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace lm {

constexpr int kFp8Group = 128;
constexpr int kFp8LeastExponent = -126, kFp8ExponentBias = 127;  // 2^e is never a subnormal number
constexpr uint32_t kFp8Nan = 0x7Fu;

LM_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

LM_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// The scale's byte for the largest finite magnitude of a group (0 for a group of zeros gives the least scale).
LM_HD uint32_t fp8_scale_byte(float largest) {
  const uint32_t u = float_bits(largest);
  int e = static_cast<int>(u >> 23) - 127 - 8 + ((u & 0x7FFFFFu) > 0x600000u ? 1 : 0);  // 448 = 1.75 * 2^8
  if (e < kFp8LeastExponent) e = kFp8LeastExponent;
  return static_cast<uint32_t>(e + kFp8ExponentBias);
}

LM_HD float fp8_scale(uint32_t byte) { return bits_float(byte << 23); }
LM_HD float fp8_inverse_scale(uint32_t byte) { return bits_float((254u - byte) << 23); }

// |x| <= 448 or NaN, rounded to nearest even.
LM_HD uint32_t e4m3_from_float(float x) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kFp8Nan;
  const uint32_t sign = (u >> 24) & 0x80u;
  if (magnitude < 0x3C800000u) {  // below 2^-6: a multiple of 2^-9, which is the unit in the last place of 2^14
    return sign | (float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u);
  }
  return sign | (((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3));
}

LM_HD float e4m3_to_float(uint32_t code) {
  const uint32_t magnitude = code & 0x7Fu, sign = (code & 0x80u) << 24;
  if (magnitude == kFp8Nan) return bits_float(0x7FC00000u);
  const float value =
      magnitude < 8u ? static_cast<float>(magnitude) * 0.001953125f : bits_float((magnitude + (120u << 3)) << 20);
  return bits_float(float_bits(value) | sign);
}

}  // namespace lm
