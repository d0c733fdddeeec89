// The quant kernels for any processor.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/quant_impl.h"

namespace lm {

// Products and sums are rounded one by one: setup.py turns their fusion off (-ffp-contract=off).
void quant_scales(const QuantView& w, int64_t first, int64_t count, float* scales) {
  if (w.spec.scale_bits == 8) {
    const uint8_t* u = static_cast<const uint8_t*>(w.scale) + first;
    for (int64_t i = 0; i < count;) {
      const int64_t block = (first + i) >> w.spec.log2_scale_group;
      const int64_t left = ((block + 1) << w.spec.log2_scale_group) - first;
      const int64_t end = left < count ? left : count;
      const float absmax = load_as_float(w.scale_absmax, w.float_dtype, block);
      const float offset = load_as_float(w.scale_offset, w.float_dtype, block * w.offset_step);
      for (; i < end; ++i) scales[i] = add_rounded(mul_rounded(w.scale_code[u[i]], absmax), offset);
    }
  } else if (w.spec.scale_bits == 0 && w.float_dtype == kFloat32) {
    const float* from = static_cast<const float*>(w.scale) + first;
    for (int64_t i = 0; i < count; ++i) scales[i] = from[i];
  } else if (w.spec.scale_bits == 0 && w.float_dtype == kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(w.scale) + first;
    for (int64_t i = 0; i < count; ++i) scales[i] = float_of_bits(static_cast<uint32_t>(from[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) scales[i] = scale_at(w, first + i);
  }
}

void quant_zeros(const QuantView& w, int64_t first, int64_t count, float* zeros) {
  const float middle = w.spec.is_table() ? 0.0f : static_cast<float>(1 << (w.spec.bits - 1));
  for (int64_t i = 0; i < count; ++i) zeros[i] = w.zero ? load_as_float(w.zero, w.zero_dtype, first + i) : middle;
}

void quant_units(const QuantSpec& spec, float* units) {
  for (uint32_t c = 0; c < 16; ++c) {
    switch (spec.format) {
      case kNF4: units[c] = nf4_value(c); break;
      case kFP4: units[c] = fp4_value(c); break;
      case kNF3: units[c] = nf3_value(c); break;
      case kNF2: units[c] = nf2_value(c); break;
      default: units[c] = static_cast<float>(c);
    }
  }
}

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/quant_kernels.h"

struct Plain {
  template <int kBits, class T>
  static void lookup(const uint8_t* run, int64_t i, int64_t n, const float* table, T* out) {
    if constexpr (kBits == 3) {
      for (int64_t j = 0; j < n; j += kGranule) {
        const uint8_t* bytes = run + (i + j) / kGranule * 12;
        for (int b = 0; b < kGranule; ++b) {
          const uint32_t code = (bytes[b / 8] >> b % 8 & 1u) | (bytes[4 + b / 8] >> b % 8 & 1u) << 1 |
                                (bytes[8 + b / 8] >> b % 8 & 1u) << 2;
          out[j + b] = static_cast<T>(table[code]);
        }
      }
    } else {
      constexpr int kPer = 8 / kBits;
      T narrow[16];
      for (int c = 0; c < (1 << kBits); ++c) narrow[c] = static_cast<T>(table[c]);
      const uint8_t* bytes = run + i / kPer;
      for (int64_t j = 0; j < n; j += kPer) {
        const uint32_t byte = bytes[j / kPer];
        for (int e = 0; e < kPer; ++e) out[j + e] = narrow[byte >> (8 - kBits - kBits * e) & ((1u << kBits) - 1u)];
      }
    }
  }
  template <class T>
  static void affine8(const uint8_t* codes, int64_t n, float zero, float scale, T* out) {
    for (int64_t i = 0; i < n; ++i) {
      const float value = static_cast<float>(codes[i]) - zero;
      out[i] = static_cast<T>(value * scale);
    }
  }
};

constexpr QuantKernels kKernels = kernels_of<Plain>();

}  // namespace

const QuantKernels* quant_plain() { return &kKernels; }

}  // namespace lm
