// The passes of the lora family over one or many problems in one parallel region each: packing of the thin operands,
// and the partition of the work. lora.cpp (one adapter) and lora_multi.cpp (many) make the problems; the loops
// themselves are in lora_kernels.h.
//
// The partition of every sum depends on its problem's shape alone and partial sums are added in order: the bits of a
// result depend neither on the number of threads nor on the problems beside it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/lora_impl.h"
#include "cpu/lora_pack.h"

namespace lm {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;
Buffer allocate(int64_t bytes);

Dtype dtype_of(const Tensor& t);
const LoraKernels& kernels_for(const Tensor& t);

// A matrix, or a vector, on like's device.
Tensor empty(const Tensor& like, ScalarType type, int64_t rows, int64_t cols);
Tensor empty_vector(const Tensor& like, ScalarType type, int64_t size = 0);
void fill_zero(const Tensor& t);
// The same matrix with neighbouring elements in a row.
Tensor unit_rows(const Tensor& t);

Thin thin(const Tensor& t, int64_t depth, int64_t columns, int64_t sk, int64_t sj);
inline char* at(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }
inline const char* at(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }

// args.out[m, :] = alpha * drop(x) P for `rows` rows; run_dot fills in args.panels and args.rank.
struct DotTask {
  DotArgs args;
  int64_t rows;
  Thin p;
};
void run_dot(const Tensor& x, std::vector<DotTask>& tasks);

// Where a pass leaves a sum: alpha times it, in `type`, rows of stride ld.
struct Sum {
  void* out;
  Dtype type;
  int64_t ld;
  double alpha;
};

// outer = drop(y)^T q as [cols, rank], or [rank, cols] when `transposed`, and with `both` also dot = y P, in one read
// of y.
struct PassTask {
  PassArgs args;  // y, index, ld, cols and drop; run_pass fills in the rest
  int64_t rows;
  Thin q, p;
  bool both, transposed;
  Sum outer, dot;
};
void run_pass(const Tensor& y, std::vector<PassTask>& tasks);

// args.out[m, :] = accumulate * out[m, :] + alpha * keep * (d P) for `rows` rows; run_expand fills in args.panels.
struct ExpandTask {
  ExpandArgs args;
  int64_t rows;
  Thin p;  // [rank, cols]
};
void run_expand(const Tensor& out, std::vector<ExpandTask>& tasks);

// Above this rank dS and dB are two reads of dy: they are bound by arithmetic.
constexpr int64_t kFusedRank = 64;

}  // namespace lm
