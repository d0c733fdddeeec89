// Table formats: NF4 (QLoRA, arXiv 2305.14314), NF3 and NF2 (the same construction, LQ-LoRA, arXiv 2311.12023), FP4 in
// bitsandbytes' order. Values lie in [-1, 1]; a weight is value * scale, the scale its group's absolute maximum. The
// same numbers as lowmem/quant/formats.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lm {

LM_HD float nf4_value(uint32_t code) {
  constexpr float table[16] = {-1.0f,
                               -0.6961928009986877f,
                               -0.5250730514526367f,
                               -0.39491748809814453f,
                               -0.28444138169288635f,
                               -0.18477343022823334f,
                               -0.09105003625154495f,
                               0.0f,
                               0.07958029955625534f,
                               0.16093020141124725f,
                               0.24611230194568634f,
                               0.33791524171829224f,
                               0.44070982933044434f,
                               0.5626170039176941f,
                               0.7229568362236023f,
                               1.0f};
  return table[code & 15u];
}

LM_HD float nf3_value(uint32_t code) {
  constexpr float table[8] = {-1.0f,
                              -0.4786292016506195f,
                              -0.217141792178154f,
                              0.0f,
                              0.16093020141124725f,
                              0.33791524171829224f,
                              0.5626170039176941f,
                              1.0f};
  return table[code & 7u];
}

LM_HD float nf2_value(uint32_t code) {
  constexpr float table[4] = {-1.0f, 0.0f, 0.33791524171829224f, 1.0f};
  return table[code & 3u];
}

// One sign bit; the magnitudes are divided by the largest, as bitsandbytes' table is.
LM_HD float fp4_value(uint32_t code) {
  constexpr float table[8] = {0.0f,         0.0625f / 12.0f, 8.0f / 12.0f, 12.0f / 12.0f,
                              4.0f / 12.0f, 6.0f / 12.0f,    2.0f / 12.0f, 3.0f / 12.0f};
  const float magnitude = table[code & 7u];
  return code & 8u ? -magnitude : magnitude;
}

}  // namespace lm
