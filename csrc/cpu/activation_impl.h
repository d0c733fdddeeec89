// What csrc/cpu/activation.cpp and csrc/cpu/activation_loss.cpp (tensors, checks, partition) ask of the activation
// kernels, which are compiled once per instruction set from csrc/cpu/activation_kernels.h. Plain pointers and sizes.
//
// Matrices have neighbouring elements in a row; `ld_*` are row strides. A kernel owns rows [row0, row1).
#pragma once

#include <cstdint>

#include "cpu/lora_impl.h"  // Dtype, lora_isa

namespace lm {

// What is kept of a tensor for backward (lowmem/ops/activation.py: FORMS).
enum Form { kPlain = 0, kFp8 = 1, kDeriv4 = 2, kDeriv2 = 3 };
enum Kind { kSilu = 0, kGelu = 1, kGeluTanh = 2, kKinds };

// FP8 groups of a [rows, cols] matrix: the codes, then the scales' bytes [rows, ceil(cols / 128)].
struct Packed {
  uint8_t* codes = nullptr;
  uint8_t* scales = nullptr;
};

struct LossArgs {
  void* logits;
  int64_t ld, cols;
  void* loss;             // accumulation dtype
  const int64_t* target;  // with its stride
  int64_t target_stride;
  const void* bias;    // accumulation dtype, or null
  const void* factor;  // accumulation dtype with its stride, or null: no gradient
  int64_t factor_stride, ignore_index;
  double smoothing, z_loss, softcap;
};

struct PackArgs {
  const void* x;
  void* out;  // of unpack
  int64_t ld, cols;
  Packed packed;
};

struct NormArgs {
  const void *x, *residual, *weight, *bias;  // weight and bias: accumulation dtype, or null
  int64_t ld_x, ld_residual, cols;
  void *y, *summed;  // summed: x + residual, where there is one
  Packed packed;     // of the normalised row, where its codes are not null
  void* stats;       // accumulation dtype: [rows, 1] rstd, or [rows, 2] mean and rstd where `center`
  double eps;
  bool center;
};

struct NormGradArgs {
  const void *dy, *dsum, *x;  // dsum: the gradient of `summed`, or null; x null: the packed normalised row
  int64_t ld_dy, ld_dsum, ld_x, cols;
  Packed packed;
  const void *weight, *stats;
  void *dx, *dw, *db;  // dw, db: [cols] sums of these rows in the accumulation dtype, or null
  bool center;
};

struct ActArgs {
  const void* x;  // forward; backward: or null, where `saved` is used
  int64_t ld_x, cols;
  void* out;  // y, or dx
  const void* dy;
  int64_t ld_dy;
  Form form;
  Packed packed;
  uint8_t* saved;  // derivative codes [rows, bytes]
  int64_t bytes;
};

struct GluArgs {
  const void *g, *u;  // null in backward: packed
  int64_t ld_g, ld_u, cols;
  Packed packed_g, packed_u;
  void* h;  // forward
  const void* dh;
  int64_t ld_dh;
  void *dg, *du;
};

struct ActivationKernels {
  void (*loss)(const LossArgs&, int64_t row0, int64_t row1);
  void (*pack)(const PackArgs&, int64_t row0, int64_t row1);
  void (*unpack)(const PackArgs&, int64_t row0, int64_t row1);
  void (*norm)(const NormArgs&, int64_t row0, int64_t row1);
  void (*norm_grad)(const NormGradArgs&, int64_t row0, int64_t row1);
  void (*act[kKinds])(const ActArgs&, int64_t row0, int64_t row1);
  void (*act_grad[kKinds])(const ActArgs&, int64_t row0, int64_t row1);
  void (*glu)(const GluArgs&, int64_t row0, int64_t row1);
  void (*glu_grad)(const GluArgs&, int64_t row0, int64_t row1);
};

struct ActivationIsa {
  ActivationKernels types[kDtypes];
};

// null where this compiler or architecture does not have the level
const ActivationIsa* activation_plain();
const ActivationIsa* activation_avx2();
const ActivationIsa* activation_avx512();

// A buffer of the calling thread, one of two; it lives until the next call that wants more. Not in the kernels' own
// files: code of the standard library must not be compiled for one level's instructions.
void* activation_scratch(int64_t bytes, int which);

// The level of lora_isa(), which LOWMEM_CPU_ISA may name.
const ActivationIsa& activation_isa();

}  // namespace lm
