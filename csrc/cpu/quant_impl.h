// What csrc/cpu/quant.cpp (tensors, checks, partition) asks of the quant kernels, which are compiled once per
// instruction set from csrc/cpu/quant_kernels.h. Plain pointers and sizes; nothing of torch.
#pragma once

#include <cstdint>

#include "common/quant.h"

namespace lm {

constexpr int kSmallRows = 32;    // rows of x that one call of dot and outer takes
constexpr int kOuterCols = 512;   // columns of W that one call of outer takes
constexpr int kGroupBatch = 256;  // scales that are read at a time
enum QuantOut : int { kOutFloat = 0, kOutBFloat16, kOutHalf, kQuantOuts };

// Scales (and zeros, where there are any) first .. first + count - 1 in fp32.
void quant_scales(const QuantView& w, int64_t first, int64_t count, float* scales);
void quant_zeros(const QuantView& w, int64_t first, int64_t count, float* zeros);

// The values of a spec's codes before scales and zeros: table, or 0, 1, 2, ...
void quant_units(const QuantSpec& spec, float* units);

// y[m, n] = sum_k x[m, k] W[row0 + n, k], for n0 <= n < n1
struct QuantDot {
  QuantView w;
  int64_t row0;
  const float* x;       // [rows, k], or null where x16 serves
  const uint16_t* x16;  // bf16 as the level's `pack` laid it out
  int rows;             // <= kSmallRows
  int padded;           // rows of x16
  int64_t ld_x16;       // their stride
  float* y;             // [rows, ld]
  int64_t ld;
};

// out[m, c - c0] = sum_n dy[m, n] W[row0 + n, c], for c0 <= c < c1 <= c0 + kOuterCols
struct QuantOuter {
  QuantView w;
  int64_t row0, n;
  const float* dy;       // [rows, n], or null where dy16 serves
  const uint32_t* dy16;  // bf16 neighbours in n as pairs, [padded][ceil(n / 2)]
  int rows, padded;
  float* out;  // [rows, ld]
  int64_t ld;
};

// The absmax quantizer over groups [g0, g1) of a matrix of fp32, bf16 or fp16.
struct QuantizeArgs {
  QuantSpec spec;
  const void* w;
  QuantOut type;
  int64_t rows, k;
  uint8_t* packed;  // zeroed
  void* scale;      // of float_dtype
  int float_dtype;
  uint8_t* zero;  // or null
};

struct QuantKernels {
  // one row's columns col0 .. col0 + cols - 1, in the type of the name
  void (*dequantize[kQuantOuts])(const QuantView&, int64_t row, int64_t col0, int64_t cols, void* out);
  void (*dot)(const QuantDot&, int64_t n0, int64_t n1);
  void (*outer)(const QuantOuter&, int64_t c0, int64_t c1);
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end);
  // bf16 products of packed operands, null where the level has none: whether they serve this weight; the width that x
  // is padded to; x's and dy's layout
  bool (*serves16)(const QuantView&);
  void (*dot16)(const QuantDot&, int64_t n0, int64_t n1);
  void (*outer16)(const QuantOuter&, int64_t c0, int64_t c1);
  void (*pack16)(const QuantView&, const uint16_t* x, int64_t ld, int rows, int padded, int64_t ld_out, uint16_t* out);
};

// Kernels of each level; those that this compiler or architecture does not have return null.
const QuantKernels* quant_plain();
const QuantKernels* quant_avx2();
const QuantKernels* quant_avx512();
const QuantKernels* quant_avx512_bf16();

// The best level of this machine, or the one LOWMEM_CPU_ISA names. Chosen once.
const QuantKernels& quant_kernels();

}  // namespace lm
