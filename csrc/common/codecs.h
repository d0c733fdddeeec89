// The number formats of lowmem/ops/codecs.py, where their formulas stand: names and constants here, the arithmetic in
// codec_math.h. For the host and the device, with the bits of the Python reference on each.
//
// Single numbers: lm::one (a namespace, because files with vector instructions include the arithmetic once more).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace lm {

enum class Codec : int { kFp32, kE4M3, kE4M3Exp, kE5M2, kDe8, kDe8Exp, kLog8, kInt8, kInt4 };  // as in codecs.py
constexpr int kCodecs = 9;
constexpr const char* kCodecNames[kCodecs] = {"fp32",    "e4m3", "e4m3+exp", "e5m2", "de8",
                                              "de8+exp", "log8", "int8",     "int4"};

LM_HD constexpr bool with_span(Codec c) { return c == Codec::kE4M3Exp || c == Codec::kDe8Exp || c == Codec::kLog8; }
LM_HD constexpr bool is_tree(Codec c) { return c == Codec::kDe8 || c == Codec::kDe8Exp; }
LM_HD constexpr bool is_expanded(Codec c) { return c == Codec::kE4M3Exp || c == Codec::kDe8Exp; }
LM_HD constexpr int code_bits(Codec c) { return c == Codec::kInt4 ? 4 : 8; }
LM_HD constexpr Codec base_of(Codec c) {
  return c == Codec::kE4M3Exp ? Codec::kE4M3 : c == Codec::kDe8Exp ? Codec::kDe8 : c;
}

// What a group's largest magnitude is scaled to before it is rounded.
LM_HD constexpr float top_of(Codec c, bool is_signed) {
  return c == Codec::kE4M3 || c == Codec::kE4M3Exp ? 448.f
         : c == Codec::kE5M2                       ? 57344.f
         : c == Codec::kInt8                       ? (is_signed ? 127.f : 255.f)
         : c == Codec::kInt4                       ? (is_signed ? 7.f : 15.f)
                                                   : 1.f;
}

LM_HD constexpr int levels_of(bool is_signed) { return is_signed ? 127 : 255; }  // of log8
LM_HD constexpr int log8_widest(bool is_signed) { return is_signed ? 48 : 240; }
// 16 D, rounded to fp32
LM_HD constexpr float expansion_of(Codec c, bool is_signed) {
  return static_cast<float>(16.0 * (c == Codec::kE4M3Exp ? 16.6147098541 : is_signed ? 20.7838853169 : 24.1109123212));
}

// Groups whose largest magnitude is below 2**-100 are zeros.
constexpr uint32_t kLeastScaleBits = 27u << 23;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kLeastNormalBits = 0x00800000u;

// Rows of a de8 table, eight places each: value, code and decision constants of a leading bit.
enum TreeRow { kTreeBase, kTreeSlope, kTreeBins, kTreeFirst, kTreeLeast, kTreeRows };
constexpr int kTreeFloats = 8 * kTreeRows;

// Element `i` of the table of signed (seven places) or unsigned de8. A function, so that the device needs no constant
// memory: kernels copy it to shared memory.
LM_HD float tree_constant(bool is_signed, int i) {
  const float table[2][kTreeFloats] = {
      {-0x1.2db55ap-25f, -0x1.35ca36p-21f, -0x1.cf004ep-18f, -0x1.390d4cp-14f,
       -0x1.961cd0p-11f, -0x1.0271d0p-7f,  -0x1.45f226p-4f,  -0x1.993d1ep-1f,  //
       0x1.83e92ap-24f,  0x1.e4e376p-22f,  0x1.2f0e2ap-19f,  0x1.7ad1b4p-17f,
       0x1.d98620p-15f,  0x1.27f3d4p-12f,  0x1.71f0cap-10f,  0x1.ce6cfcp-8f,  //
       0x1.51e462p+23f,  0x1.0e504ep+21f,  0x1.b0807cp+18f,  0x1.5a0064p+16f,
       0x1.14cd1cp+14f,  0x1.bae1c8p+11f,  0x1.624e38p+9f,   0x1.1b71c8p+7f,  //
       0x1.c71c72p-1f,   0x1.c71c72p+0f,   0x1.c71c72p+1f,   0x1.c71c72p+2f,
       0x1.c71c72p+3f,   0x1.c71c72p+4f,   0x1.c71c72p+5f,   0x1.c71c72p+6f,  //
       0x1.da1cfcp-26f,  0x1.99761ep-23f,  0x1.869acap-20f,  0x1.9c7df2p-17f,
       0x1.d44336p-14f,  0x1.15ddd2p-10f,  0x1.5215a6p-7f,   0x1.a0d34ep-4f},
      {-0x1.7a7884p-22f, -0x1.849bbep-18f, -0x1.226678p-14f, -0x1.88b34cp-11f,
       -0x1.fd7020p-8f,  -0x1.443314p-4f,  -0x1.98dffap-1f,  0.f,  //
       0x1.e69af2p-21f,  0x1.3020d8p-18f,  0x1.7c290ep-16f,  0x1.db3350p-14f,
       0x1.290012p-11f,  0x1.734018p-9f,   0x1.d0101ep-7f,   0.f,  //
       0x1.0d5c2ap+20f,  0x1.aef9dcp+17f,  0x1.58c7e4p+15f,  0x1.13d31cp+13f,
       0x1.b951c8p+10f,  0x1.610e38p+8f,   0x1.1a71c8p+6f,   0.f,  //
       0x1.c71c72p-1f,   0x1.c71c72p+0f,   0x1.c71c72p+1f,   0x1.c71c72p+2f,
       0x1.c71c72p+3f,   0x1.c71c72p+4f,   0x1.c71c72p+5f,   0.f,  //
       0x1.295eb0p-22f,  0x1.00d1c8p-19f,  0x1.e9fc06p-17f,  0x1.02b862p-13f,
       0x1.25b346p-10f,  0x1.5c9016p-7f,   0x1.a81a1ap-4f,   2.f}};  // nothing is that large
  return table[is_signed ? 1 : 0][i];
}

// What a group keeps: its largest magnitude, and a byte whose meaning is the codec's (0 where it has none).
struct GroupScale {
  float scale;
  uint8_t span;
};

// Per group, derived from its GroupScale: the numbers that encode() and decode() work with.
struct EncodeBy {
  float mul, log_scale;
  int last;    // of signed log8: codes at or below it are nearer to 0
  bool alive;  // else all codes are 0
};
struct DecodeBy {
  float mul, scale;
};

namespace one {
#include "codec_math.h"
}  // namespace one

}  // namespace lm
