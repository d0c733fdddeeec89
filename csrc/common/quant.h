// A quantized weight as operators get it: the spec in one integer (QuantSpec.code of lowmem/quant/formats.py) and raw
// pointers, with the value of one element as the definition that every kernel must equal bit for bit.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "intk.h"
#include "nf.h"

namespace lm {

enum QuantFormat : int { kNF4 = 0, kFP4, kNF3, kNF2, kInt8, kInt4, kInt3, kInt2 };
constexpr int kQuantFormats = 8;

// What scales, zeros, scale_absmax and scale_offset are stored in. uint8 zeros are kByte.
enum QuantDtype : int { kFloat32 = 0, kBFloat16, kFloat16, kByte };

struct QuantSpec {
  int format;
  int bits;
  int log2_group;        // 31: one scale for each row
  int scale_bits;        // 0: scales are floats
  int log2_scale_group;  // scales in a block of the second level

  LM_HD bool is_table() const { return format < kInt8; }
  LM_HD bool per_row() const { return log2_group == 31; }
  // Scales of one row of an int format.
  LM_HD int64_t row_groups(int64_t k) const { return per_row() ? 1 : k >> log2_group; }
  LM_HD int64_t scale_count(int64_t rows, int64_t k) const {
    return is_table() ? (rows * k + (int64_t{1} << log2_group) - 1) >> log2_group : rows * row_groups(k);
  }
  LM_HD int64_t packed_bytes(int64_t rows, int64_t k) const {
    return is_table() ? row_bytes(bits, rows * k) : rows * row_bytes(bits, k);
  }
};

LM_HD QuantSpec unpack_spec(int64_t code) {
  QuantSpec spec{};
  spec.format = static_cast<int>(code & 15);
  spec.bits = spec.format == kInt8                          ? 8
              : spec.format == kNF3 || spec.format == kInt3 ? 3
              : spec.format == kNF2 || spec.format == kInt2 ? 2
                                                            : 4;
  spec.log2_group = static_cast<int>(code >> 4 & 31);
  spec.scale_bits = static_cast<int>(code >> 9 & 15);
  spec.log2_scale_group = static_cast<int>(code >> 13 & 31);
  return spec;
}

// bf16 and fp16 as their bits: this header serves hosts and devices without either's types.
LM_HD float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

LM_HD float half_value(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2**-24
    const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return float_of_bits(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112u) << 23) | fraction << 13);
}

LM_HD float load_as_float(const void* data, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat32: return static_cast<const float*>(data)[i];
    case kBFloat16: return float_of_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
    case kFloat16: return half_value(static_cast<const uint16_t*>(data)[i]);
    default: return static_cast<float>(static_cast<const uint8_t*>(data)[i]);
  }
}

struct QuantView {
  QuantSpec spec;
  const uint8_t* packed;
  const void* scale;         // float_dtype, or packed codes where spec.scale_bits > 0
  const void* zero;          // zero_dtype, or null
  const float* scale_code;   // [2**scale_bits]
  const void* scale_absmax;  // float_dtype
  const void* scale_offset;  // float_dtype
  int64_t offset_step;       // 0: one offset for all blocks, 1: one for each
  int float_dtype, zero_dtype;
  int64_t k;  // columns
};

// Scale i of the weight.
LM_HD float scale_at(const QuantView& w, int64_t i) {
  if (w.spec.scale_bits == 0) return load_as_float(w.scale, w.float_dtype, i);
  const uint32_t u = code_at(w.spec.scale_bits, static_cast<const uint8_t*>(w.scale), i);
  const int64_t block = i >> w.spec.log2_scale_group;
  return add_rounded(mul_rounded(w.scale_code[u], load_as_float(w.scale_absmax, w.float_dtype, block)),
                     load_as_float(w.scale_offset, w.float_dtype, block * w.offset_step));
}

// The scale's index of element (row, col).
LM_HD int64_t group_of(const QuantView& w, int64_t row, int64_t col) {
  if (w.spec.is_table()) return (row * w.k + col) >> w.spec.log2_group;
  return w.spec.per_row() ? row : row * (w.k >> w.spec.log2_group) + (col >> w.spec.log2_group);
}

LM_HD uint32_t weight_code(const QuantView& w, int64_t row, int64_t col) {
  if (w.spec.is_table()) return code_at(w.spec.bits, w.packed, row * w.k + col);
  return code_at(w.spec.bits, w.packed + row * row_bytes(w.spec.bits, w.k), col);
}

// The value of a code over its scale: table[code], or code - zero of group i.
LM_HD float unit_value(const QuantView& w, uint32_t code, int64_t group) {
  switch (w.spec.format) {
    case kNF4: return nf4_value(code);
    case kFP4: return fp4_value(code);
    case kNF3: return nf3_value(code);
    case kNF2: return nf2_value(code);
    default: break;
  }
  const float middle = static_cast<float>(1 << (w.spec.bits - 1));
  return static_cast<float>(code) - (w.zero ? load_as_float(w.zero, w.zero_dtype, group) : middle);
}

// W[row, col] in fp32.
LM_HD float weight_at(const QuantView& w, int64_t row, int64_t col) {
  const int64_t group = group_of(w, row, col);
  return mul_rounded(unit_value(w, weight_code(w, row, col), group), scale_at(w, group));
}

}  // namespace lm
