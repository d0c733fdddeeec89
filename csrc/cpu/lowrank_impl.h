// What csrc/cpu/lowrank.cpp asks of the lowrank kernels, which are compiled once per instruction set. Plain pointers.
#pragma once

#include <cstdint>

#include "cpu/lora_impl.h"

namespace lm {

constexpr uint32_t kRoundingChild = 1;  // the random stream of weight rounding; dropout uses 0

// w[i, c] = decay w[i, c] + alpha x[i, c], rounded to w's dtype: to nearest, or (bf16) stochastically by the 16-bit
// number that dropout would draw for element (first_row + i, c) under child 1.
struct AxpyArgs {
  void* w;
  int64_t ld_w;
  const void* x;
  int64_t ld_x, cols;
  double alpha, decay;
  bool stochastic;
  uint64_t seed;
  int64_t first_row;
};

// m = beta1 m + (1 - beta1) r;  v = beta2 v + (1 - beta2) r^2;  n = (m / bias1) / (sqrt(v / bias2) + eps)
struct AdamArgs {
  void* m;  // fp32, or fp64 with r
  void* v;
  const void* r;
  void* n;  // r's dtype
  double beta1, beta2, bias1, bias2, eps;
};

struct LowrankKernels {
  void (*axpy[kDtypes][2])(const AxpyArgs&, int64_t row0, int64_t row1);  // by w's dtype; x in the same, or fp32
  void (*adam[kDtypes])(const AdamArgs&, int64_t begin, int64_t end);     // by r's dtype
};

const LowrankKernels& lowrank_plain();
const LowrankKernels* lowrank_avx512();  // null where this compiler or architecture has none

}  // namespace lm
