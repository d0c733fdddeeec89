// What csrc/cpu/lora.cpp (tensors, checks, partition) asks of the lora kernels, which are compiled once per instruction
// set from csrc/cpu/lora_kernels.h. Plain pointers and sizes; nothing of torch.
//
// Every product of the family is one small GEMM kernel over two packed operands:
//   panels  the thin operand (A, B, S or dS), 16 columns a panel, [step][16] elements, zero-padded
//   tiles   a piece of the fat operand (x, dy), converted, masked and laid out for broadcasts from the first-level
//   cache
// An element is one fp32 or fp64 number, or, for the BF16 dot product, two bf16 neighbours in the summed dimension.
#pragma once

#include <cstdint>

namespace lm {

constexpr int kPanel = 16;       // columns of a panel
constexpr int kRankBlock = 512;  // ranks that one kernel call handles
constexpr int kMaxWidth = 16;    // rows of the widest micro-kernel

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

// The layout of a panel's elements.
enum Element { kElementFloat, kElementDouble, kElementPair };

// Dropout of a matrix: none, saved bits, or bits drawn from the seed.
struct Drop {
  bool active = false;
  uint32_t threshold = 0;
  const uint32_t* mask = nullptr;  // [rows, words], or null to draw
  int64_t words = 0;               // words of a mask row
  int64_t cols = 0;
  uint64_t seed = 0;
  uint32_t child = 0;
};

// Rows of the fat operand (x, dy, y or dx) may lie anywhere: with an `index`, row m of an operation is row index[m] of
// the matrix and of the saved bits; without, row m itself. Drawn masks and the thin operands count by m.
inline int64_t row_at(const int64_t* index, int64_t m) { return index ? index[m] : m; }

// out[m, j] = alpha * sum_c drop(x)[m, c] P[c, j]
struct DotArgs {
  const void* x;
  const int64_t* index;
  int64_t ld, cols;
  Drop drop;
  uint32_t* save;      // packed bits to keep, [rows, words], or null
  const void* panels;  // [rank panels][steps][16]
  int64_t rank;        // <= kRankBlock
  double alpha;
  void* out;  // x's dtype
  int64_t ld_out;
};

// One block of the fused pass over y [rows, cols], and of the pass that only sums over rows (panels null):
//   dot[m, j] = sum_c y[m, c] P[c, j]          outer[c, j] = sum_m drop(y)[m, c] Q[m, j]
// both in the accumulation dtype, written for the rows and columns of the block.
struct PassArgs {
  const void* y;
  const int64_t* index;
  int64_t ld, cols;
  Drop drop;
  const void* panels;         // P, or null
  const void* thin;           // Q as panels over rows
  int64_t steps, thin_steps;  // steps of P and Q
  int64_t rank_pad;           // rank rounded up to kPanel
  void* dot;                  // [rows, rank_pad]
  void* outer;                // [cols, rank_pad]
};

// out[m, c] = accumulate * out[m, c] + alpha * keep[m, c] * sum_j d[m, j] P[j, c]
struct ExpandArgs {
  void* out;
  const int64_t* index;
  int64_t ld_out, cols;
  const void* d;  // out's dtype
  int64_t ld_d, rank;
  Drop drop;
  const void* panels;  // [column panels][steps][16]
  double alpha;
  bool accumulate;
};

struct LoraKernels {
  Element element;  // of panels and tiles
  void (*dot)(const DotArgs&, int64_t row0, int64_t row1);
  void (*pass)(const PassArgs&, int64_t row0, int64_t row1, int64_t col0, int64_t col1);
  void (*expand)(const ExpandArgs&, int64_t row0, int64_t row1, int64_t col0, int64_t col1);
};

struct LoraIsa {
  const char* name;
  LoraKernels types[kDtypes];
};

// Kernels of each level; those that this compiler or architecture does not have return null.
const LoraIsa* lora_plain();
const LoraIsa* lora_avx2();
const LoraIsa* lora_avx512();
const LoraIsa* lora_avx512_bf16();

// The best level of this machine, or the one LOWMEM_CPU_ISA names (plain, avx2, avx512, avx512_bf16). Chosen once.
const LoraIsa& lora_isa();

}  // namespace lm
