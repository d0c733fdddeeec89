// What lowbit_optim.cpp and the kernels of each instruction set share. The order of the arithmetic is that of the
// reference (lowmem/ops/lowbit_optim.py), operation by operation: every instruction set gives its bits.
#pragma once

#include <cstdint>

#include "common/codecs.h"

namespace lm {

constexpr int64_t kLeastGroup = 16, kLargestGroup = 512;
constexpr int64_t kBlock = 1024;  // elements that go through the caches together: a multiple of every group size

// A tensor's numbers for one step.
struct AdamBy {
  float lr, beta1, rest1, beta2, rest2, eps, decay;  // rest: 1 - beta
  float unbias1, unbias2;                            // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  float grad_scale;
};

// `n` counts elements from a group's start. Float buffers have room for whole groups and, where they are read by
// encode, zeros behind n. Nothing outside n elements of codes, weights and gradients is touched. `ahead` is memory that
// will be wanted next (or any address): it is fetched on the way, 4 bytes an element, since in bursts the fetches would
// wait.
struct LowbitIsa {
  const char* name;
  void (*decode[kCodecs][2])(const uint8_t* codes, const float* scale, const uint8_t* span, int64_t group, int64_t n,
                             float* out, const char* ahead);  // [codec][signed]
  void (*encode[kCodecs][2])(const float* in, int64_t group, int64_t n, uint8_t* codes, float* scale, uint8_t* span,
                             const char* ahead);
  void (*adam)(float* p, const float* g, float* m, float* v, int64_t n, const AdamBy& by);
  void (*widen)(const uint16_t* from, float* to, int64_t n);                   // bf16
  void (*join)(const uint16_t* p, const int16_t* rest, float* to, int64_t n);  // bf16 + remainder: the fp32 master
  void (*split)(const float* from, uint16_t* p, int16_t* rest, int64_t n);     // and back
  // Stochastic rounding to bf16 with the 16-bit random numbers of elements `first` and on, Philox counter (element / 8,
  // step): lowmem/ops/lowbit_optim.py
  void (*dither)(const float* from, uint16_t* p, int64_t n, uint64_t seed, int64_t first, uint32_t step);
  // The sum of squares in double, and whether all are finite
  double (*squares)(const float* g, int64_t n, bool* finite);
};

const LowbitIsa* lowbit_plain();
const LowbitIsa* lowbit_avx2();    // null where not compiled
const LowbitIsa* lowbit_avx512();  // null where not compiled

}  // namespace lm
