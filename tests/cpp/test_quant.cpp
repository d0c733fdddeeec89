// csrc/common/nf.h, intk.h and quant.h: tables, packing of every width, and elements against the layout written out a
// second way. No torch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "common/quant.h"

namespace {

int failures = 0;

void expect(bool good, const char* what, int line) {
  if (good) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

void tables() {
  for (uint32_t i = 0; i + 1 < 16; ++i) EXPECT(lm::nf4_value(i) < lm::nf4_value(i + 1));
  for (uint32_t i = 0; i + 1 < 8; ++i) EXPECT(lm::nf3_value(i) < lm::nf3_value(i + 1));
  for (uint32_t i = 0; i + 1 < 4; ++i) EXPECT(lm::nf2_value(i) < lm::nf2_value(i + 1));
  EXPECT(lm::nf4_value(0) == -1.0f && lm::nf4_value(7) == 0.0f && lm::nf4_value(15) == 1.0f);
  EXPECT(lm::nf3_value(0) == -1.0f && lm::nf3_value(3) == 0.0f && lm::nf3_value(7) == 1.0f);
  EXPECT(lm::nf2_value(0) == -1.0f && lm::nf2_value(1) == 0.0f && lm::nf2_value(3) == 1.0f);
  const float fp4[8] = {0.0f, 0.0052083335f, 0.6666667f, 1.0f, 0.33333334f, 0.5f, 0.16666667f, 0.25f};
  for (uint32_t i = 0; i < 8; ++i) {
    EXPECT(lm::fp4_value(i) == fp4[i] && lm::fp4_value(i + 8) == -fp4[i]);
  }
  EXPECT(std::signbit(lm::fp4_value(8)));
}

// Bytes against a bit string: highest bit first, or, at 3 bits, planes of 32.
void packing() {
  for (int bits : {2, 3, 4, 8}) {
    for (int count : {1, 2, 3, 5, 31, 32, 33, 64, 100}) {
      const int64_t size = lm::row_bytes(bits, count);
      EXPECT(size == (bits == 3 ? (count + 31) / 32 * 12 : (count * bits + 7) / 8));
      std::vector<uint8_t> packed(size, 0), by_hand(size, 0);
      std::vector<uint32_t> codes(count);
      for (int i = 0; i < count; ++i) {
        codes[i] = (i * 7u + 3u) & ((1u << bits) - 1u);
        lm::put_code(bits, packed.data(), i, codes[i]);
        for (int b = 0; b < bits; ++b) {
          const uint32_t bit = codes[i] >> b & 1u;
          if (bits == 3) {
            by_hand[i / 32 * 12 + b * 4 + i % 32 / 8] |= bit << (i % 8);
          } else {
            const int from_top = i * bits + bits - 1 - b;
            by_hand[from_top / 8] |= bit << (7 - from_top % 8);
          }
        }
      }
      EXPECT(packed == by_hand);
      for (int i = 0; i < count; ++i) EXPECT(lm::code_at(bits, packed.data(), i) == codes[i]);
    }
  }
  const uint32_t words[3] = {0x80000001u, 0x00000002u, 0x80000003u};
  EXPECT(lm::granule_code(words[0], words[1], words[2], 0) == 5u);
  EXPECT(lm::granule_code(words[0], words[1], words[2], 1) == 6u);
  EXPECT(lm::granule_code(words[0], words[1], words[2], 31) == 5u);
}

void halves() {
  EXPECT(lm::half_value(0x3C00) == 1.0f && lm::half_value(0xC000) == -2.0f && lm::half_value(0x7BFF) == 65504.0f);
  EXPECT(lm::half_value(0x0001) == std::ldexp(1.0f, -24) && lm::half_value(0x83FF) == -std::ldexp(1023.0f, -24));
  EXPECT(std::isinf(lm::half_value(0x7C00)) && std::isnan(lm::half_value(0x7E00)) && lm::half_value(0x8000) == 0.0f);
}

void spec() {
  // nf4, groups of 64, 8-bit scales in blocks of 256
  const lm::QuantSpec s = lm::unpack_spec(0 | 6 << 4 | 8 << 9 | 8 << 13);
  EXPECT(s.is_table() && s.bits == 4 && s.log2_group == 6 && s.scale_bits == 8 && s.log2_scale_group == 8);
  EXPECT(s.scale_count(3, 77) == 4 && s.packed_bytes(3, 77) == 116);
  const lm::QuantSpec t = lm::unpack_spec(lm::kInt3 | 31 << 4);
  EXPECT(!t.is_table() && t.per_row() && t.bits == 3 && t.scale_count(3, 77) == 3 && t.packed_bytes(3, 77) == 108);
}

// Doubly quantized nf4 over rows of odd length: nibbles and groups cross rows.
void flat_groups() {
  const int rows = 5, cols = 13;
  uint8_t packed[33] = {}, u[5];
  float code[256];
  for (int i = 0; i < 256; ++i) code[i] = static_cast<float>(i) / 255.0f;
  for (int i = 0; i < rows * cols; ++i) lm::put_code(4, packed, i, (i * 5) % 16);
  for (int i = 0; i < 5; ++i) u[i] = static_cast<uint8_t>(40 * i);
  const float absmax[1] = {0.75f}, offset[1] = {0.125f};
  lm::QuantView w{lm::unpack_spec(lm::kNF4 | 4 << 4 | 8 << 9 | 8 << 13),
                  packed,
                  u,
                  nullptr,
                  code,
                  absmax,
                  offset,
                  0,
                  lm::kFloat32,
                  lm::kByte,
                  cols};
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; ++col) {
      const int i = row * cols + col;
      const float scale = code[u[i / 16]] * 0.75f + 0.125f;
      EXPECT(lm::weight_at(w, row, col) == lm::nf4_value((i * 5) % 16) * scale);
    }
  }
}

// int3 with byte zeros: rows start at a granule, groups lie within rows; and per row, without zeros, bf16 scales.
void affine_rows() {
  const int rows = 3, cols = 64;
  std::vector<uint8_t> packed(rows * 24, 0);
  float scales[12];
  uint8_t zeros[12];
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; ++col) lm::put_code(3, packed.data() + row * 24, col, (row + col) % 8);
  }
  for (int i = 0; i < 12; ++i) {
    scales[i] = 0.1f * (i + 1);
    zeros[i] = i % 8;
  }
  lm::QuantView w{lm::unpack_spec(lm::kInt3 | 4 << 4),
                  packed.data(),
                  scales,
                  zeros,
                  nullptr,
                  nullptr,
                  nullptr,
                  0,
                  lm::kFloat32,
                  lm::kByte,
                  cols};
  for (int row = 0; row < rows; ++row) {
    for (int col = 0; col < cols; ++col) {
      const int group = row * 4 + col / 16;
      EXPECT(lm::weight_at(w, row, col) == ((row + col) % 8 - static_cast<float>(zeros[group])) * scales[group]);
    }
  }
  const uint16_t bf16[3] = {0x3F80, 0x4000, 0xBF00};  // 1, 2, -0.5
  lm::QuantView v{lm::unpack_spec(lm::kInt3 | 31 << 4),
                  packed.data(),
                  bf16,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  0,
                  lm::kBFloat16,
                  lm::kByte,
                  cols};
  EXPECT(lm::weight_at(v, 1, 2) == -2.0f && lm::weight_at(v, 2, 0) == 1.0f && lm::weight_at(v, 0, 7) == 3.0f);
}

}  // namespace

int main() {
  tables();
  packing();
  halves();
  spec();
  flat_groups();
  affine_rows();
  std::printf(failures ? "%d failures\n" : "quant: all good\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
