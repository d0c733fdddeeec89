// CPU operators of the lowrank family (schemas, formulas and references: lowmem/ops/lowrank.py): argument checks and
// the partition of the work. The loops are in lowrank_plain.cpp and lowrank_avx512.cpp; the products are torch's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>

#include "common/checks.h"
#include "cpu/lowrank_impl.h"

namespace lm {
namespace {

constexpr int64_t kSerialElements = 1 << 16;  // less than this is not divided among threads

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    default: return kFloat16;
  }
}

// The level that the package's other kernels run at (LOWMEM_CPU_ISA, or the best of this machine).
const LowrankKernels* wide() { return std::strncmp(lora_isa().name, "avx512", 6) == 0 ? lowrank_avx512() : nullptr; }

void check_rows(const char* op, const char* name, const Tensor& t) {
  if (t.size(1) > 1 && t.stride(1) != 1) bad(op, name, "neighbouring elements in a row", "another stride");
}

void axpy_(const Tensor& w, const Tensor& x, double alpha, double decay, std::optional<Tensor> seed, int64_t row) {
  const char* op = "lowrank_axpy_";
  check_floating(op, "w", w);
  check_matrix(op, "w", w, -1, -1);
  check_matrix(op, "x", x, w.size(0), w.size(1));
  if (x.scalar_type() != w.scalar_type() && x.scalar_type() != ScalarType::Float) {
    bad(op, "x", dtype_text(w.scalar_type()) + " or torch.float32", dtype_text(x.scalar_type()));
  }
  check_rows(op, "w", w);
  check_rows(op, "x", x);
  AxpyArgs args{};
  if (seed) {
    check_dtype(op, "seed", *seed, ScalarType::Long);
    if (seed->numel() != 1) bad(op, "seed", "one element", shape_text(*seed));
    args.stochastic = w.scalar_type() == ScalarType::BFloat16;
    args.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }
  args.w = w.data_ptr();
  args.ld_w = w.stride(0);
  args.x = x.data_ptr();
  args.ld_x = x.stride(0);
  args.cols = w.size(1);
  args.alpha = alpha;
  args.decay = decay;
  args.first_row = row;
  const Dtype type = dtype_of(w);
  const int other = x.scalar_type() == w.scalar_type() ? 0 : 1;
  auto kernel = wide() ? wide()->axpy[type][other] : nullptr;
  if (!kernel) kernel = lowrank_plain().axpy[type][other];
  const int64_t grain = 1 + kSerialElements / (args.cols + 1);
  torch::stable::parallel_for(0, w.size(0), grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor adam_(const Tensor& m, const Tensor& v, const Tensor& r, double beta1, double beta2, double bias1, double bias2,
             double eps) {
  const char* op = "lowrank_adam_";
  check_floating(op, "r", r);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("exp_avg", m), {"exp_avg_sq", v}}) {
    check_dtype(op, name, t, accumulate_dtype(r.scalar_type()));
    if (t.numel() != r.numel()) bad(op, name, "as many elements as r", shape_text(t));
    if (!t.is_contiguous()) bad(op, name, "a contiguous tensor", "strides");
  }
  const Tensor in = r.is_contiguous() ? r : torch::stable::contiguous(r);
  Tensor n = torch::stable::empty_like(in);
  AdamArgs args{m.data_ptr(), v.data_ptr(), in.data_ptr(), n.data_ptr(), beta1, beta2, bias1, bias2, eps};
  const Dtype type = dtype_of(r);
  auto kernel = wide() ? wide()->adam[type] : nullptr;
  if (!kernel) kernel = lowrank_plain().adam[type];
  torch::stable::parallel_for(0, r.numel(), kSerialElements,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return n;
}

}  // namespace
}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("lowrank_axpy_", TORCH_BOX(&lm::axpy_));
  m.impl("lowrank_adam_", TORCH_BOX(&lm::adam_));
}
