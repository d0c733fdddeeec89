// CPU operators of the lora family (schemas, formulas and references: lowmem/ops/lora.py): argument checks, and one
// problem for each pass of lora_run.h.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/philox.h"
#include "cpu/lora_run.h"

namespace lm {
namespace {

Drop make_drop(const char* op, int64_t rows, int64_t cols, double p, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& seed, int64_t child) {
  Drop drop;
  if (!(p >= 0.0 && p <= 1.0)) bad(op, "p", "a probability in [0, 1]", p);
  drop.cols = cols;
  drop.words = ceil_div(cols, 32);
  drop.active = p > 0.0;
  if (!drop.active) return drop;
  drop.threshold = keep_threshold(p);
  if (mask) {
    check_matrix(op, "mask", *mask, rows, drop.words);
    check_dtype(op, "mask", *mask, ScalarType::Int);
    if (!mask->is_contiguous()) bad(op, "mask", "a contiguous tensor", "strides");
    drop.mask = static_cast<const uint32_t*>(mask->data_ptr());
    return drop;
  }
  if (!seed) bad(op, "seed", "an int64 tensor of one element, since p > 0", "None");
  check_dtype(op, "seed", *seed, ScalarType::Long);
  if (seed->numel() != 1) bad(op, "seed", "one element", shape_text(*seed));
  drop.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  drop.child = static_cast<uint32_t>(child);
  return drop;
}

double inverse(double p) { return p > 0.0 ? inv_keep(keep_threshold(p)) : 1.0; }

// ---------------------------------------------------------------------------------------------------- rows dot panels

// out = alpha * drop(x) P
void dot(const Tensor& x, const Drop& drop, uint32_t* save, const Thin& p, double alpha, const Tensor& out) {
  const DotArgs args{x.data_ptr(), nullptr, x.stride(0), x.size(1),      drop,         save,
                     nullptr,      0,       alpha,       out.data_ptr(), out.stride(0)};
  std::vector<DotTask> tasks{DotTask{args, x.size(0), p}};
  run_dot(x, tasks);
}

std::tuple<Tensor, Tensor> lora_shrink(const Tensor x_in, const Tensor a, double scale, double p,
                                       const std::optional<Tensor> seed, int64_t child, bool save_mask) {
  const char* op = "lora_shrink";
  check_matrix(op, "x", x_in, -1, -1);
  check_floating(op, "x", x_in);
  const int64_t rows = x_in.size(0), cols = x_in.size(1);
  check_matrix(op, "a", a, -1, cols);
  check_floating(op, "a", a);
  const Drop drop = make_drop(op, rows, cols, p, std::nullopt, seed, child);
  const Tensor x = unit_rows(x_in);
  const int64_t r = a.size(0);
  Tensor s = empty(x, x.scalar_type(), rows, r);
  const bool save = save_mask && p > 0.0;
  Tensor mask = save ? empty(x, ScalarType::Int, rows, drop.words) : empty_vector(x, ScalarType::Int);
  uint32_t* bits = save ? static_cast<uint32_t*>(mask.data_ptr()) : nullptr;
  if (rows > 0) dot(x, drop, bits, thin(a, cols, r, a.stride(1), a.stride(0)), scale * inverse(p), s);
  return std::make_tuple(s, mask);
}

// ------------------------------------------------------------------------------------------------- sums over the rows

void pass(const Tensor& y, const Drop& drop, const Thin& q, const Thin* p, const Sum& outer, bool transposed,
          const Sum& dot) {
  PassArgs args{};
  args.y = y.data_ptr(), args.ld = y.stride(0), args.cols = y.size(1), args.drop = drop;
  std::vector<PassTask> tasks{PassTask{args, y.size(0), q, p ? *p : Thin{}, p != nullptr, transposed, outer, dot}};
  run_pass(y, tasks);
}

std::tuple<Tensor, Tensor> lora_dy(const Tensor dy_in, const Tensor b, const Tensor s, double scale) {
  const char* op = "lora_dy";
  check_matrix(op, "dy", dy_in, -1, -1);
  check_floating(op, "dy", dy_in);
  const int64_t rows = dy_in.size(0), cols = dy_in.size(1);
  check_matrix(op, "b", b, cols, -1);
  check_floating(op, "b", b);
  const int64_t r = b.size(1);
  check_matrix(op, "s", s, rows, r);
  check_dtype(op, "s", s, dy_in.scalar_type());
  const Tensor dy = unit_rows(dy_in);
  const Tensor ds = empty(dy, dy.scalar_type(), rows, r);
  const Tensor db = empty(dy, accumulate_dtype(dy.scalar_type()), cols, r);
  if (rows == 0 || cols == 0 || r == 0) {
    fill_zero(ds);
    fill_zero(db);
    return std::make_tuple(ds, db);
  }
  const Thin p = thin(b, cols, r, b.stride(0), b.stride(1)), q = thin(s, rows, r, s.stride(0), s.stride(1));
  const bool fused = r <= kFusedRank;
  if (!fused) dot(dy, Drop{}, nullptr, p, scale, ds);
  pass(dy, Drop{}, q, fused ? &p : nullptr, Sum{db.data_ptr(), dtype_of(db), r, 1.0}, false,
       Sum{ds.data_ptr(), dtype_of(ds), r, scale});
  return std::make_tuple(ds, db);
}

Tensor lora_da(const Tensor ds, const Tensor x_in, const std::optional<Tensor> mask, double p,
               const std::optional<Tensor> seed, int64_t child) {
  const char* op = "lora_da";
  check_matrix(op, "x", x_in, -1, -1);
  check_floating(op, "x", x_in);
  const int64_t rows = x_in.size(0), cols = x_in.size(1);
  check_matrix(op, "ds", ds, rows, -1);
  check_dtype(op, "ds", ds, x_in.scalar_type());
  const int64_t r = ds.size(1);
  const Drop drop = make_drop(op, rows, cols, p, mask, seed, child);
  const Tensor x = unit_rows(x_in);
  const Tensor da = empty(x, accumulate_dtype(x.scalar_type()), r, cols);
  if (rows == 0 || cols == 0 || r == 0) {
    fill_zero(da);
    return da;
  }
  pass(x, drop, thin(ds, rows, r, ds.stride(0), ds.stride(1)), nullptr,
       Sum{da.data_ptr(), dtype_of(da), cols, inverse(p)}, true, Sum{});
  return da;
}

// ------------------------------------------------------------------------------------------------- rank-r update

// out = accumulate * out + alpha * keep * (d P), P [rank, cols] at data[j * sj + c * sc]; out has unit stride in its
// rows.
void expand(const Tensor& out, const Tensor& d, const Tensor& p, int64_t sj, int64_t sc, const Drop& drop, double alpha,
            bool accumulate) {
  const int64_t rows = out.size(0), cols = out.size(1), rank = d.size(1);
  const ExpandArgs args{out.data_ptr(), nullptr, out.stride(0), cols,  d.data_ptr(), d.stride(0),
                        rank,           drop,    nullptr,       alpha, accumulate};
  std::vector<ExpandTask> tasks{ExpandTask{args, rows, thin(p, rank, cols, sj, sc)}};
  run_expand(out, tasks);
}

void lora_masked_expand(Tensor out, const Tensor ds_in, const Tensor a, const std::optional<Tensor> mask, double p,
                        const std::optional<Tensor> seed, int64_t child, bool accumulate) {
  const char* op = "lora_masked_expand_";
  check_matrix(op, "out", out, -1, -1);
  check_floating(op, "out", out);
  const int64_t rows = out.size(0), cols = out.size(1);
  check_matrix(op, "ds", ds_in, rows, -1);
  check_dtype(op, "ds", ds_in, out.scalar_type());
  check_matrix(op, "a", a, ds_in.size(1), cols);
  check_floating(op, "a", a);
  const Drop drop = make_drop(op, rows, cols, p, mask, seed, child);
  if (rows == 0 || cols == 0) return;
  const Tensor ds = unit_rows(ds_in);
  Tensor target = unit_rows(out);
  expand(target, ds, a, a.stride(0), a.stride(1), drop, inverse(p), accumulate);
  if (target.data_ptr() != out.data_ptr()) torch::stable::copy_(out, target);
}

// ------------------------------------------------------------------------------------- base GEMM and rank-r update

void check_call(int32_t error, const char* op, const char* what) {
  if (error) throw std::runtime_error(std::string("lowmem.") + op + ": torch's " + what + " failed");
}

// The transpose, as a view.
Tensor transposed(const Tensor& t) {
  const int64_t sizes[2] = {t.size(1), t.size(0)}, strides[2] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch_as_strided(t.get(), sizes, strides, &handle), "lora_expand", "as_strided");
  return Tensor(handle);
}

Tensor lora_expand(const Tensor x, const std::optional<Tensor> w, const Tensor s_in, const Tensor b,
                   const std::optional<Tensor> bias) {
  const char* op = "lora_expand";
  check_matrix(op, "x", x, -1, -1);
  check_floating(op, "x", x);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_matrix(op, "b", b, -1, -1);
  check_floating(op, "b", b);
  const int64_t n = b.size(0);
  check_matrix(op, "s", s_in, rows, b.size(1));
  check_dtype(op, "s", s_in, x.scalar_type());
  if (w) {
    check_matrix(op, "w", *w, n, cols);
    check_dtype(op, "w", *w, x.scalar_type());
  }
  if (bias) {
    check_dtype(op, "bias", *bias, x.scalar_type());
    if (bias->dim() != 1 || bias->size(0) != n) bad(op, "bias", "one element for each row of b", shape_text(*bias));
  }
  Tensor y = empty(x, x.scalar_type(), rows, n);
  if (rows == 0 || n == 0) return y;
  if (w && bias) {
    check_call(aoti_torch_cpu_addmm_out(y.get(), bias->get(), x.get(), transposed(*w).get(), 1.0, 1.0), op, "addmm");
  } else if (w) {
    check_call(aoti_torch_cpu_mm_out(y.get(), x.get(), transposed(*w).get()), op, "mm");
  } else if (bias) {
    const Tensor row = torch::stable::contiguous(*bias);
    const size_t bytes = static_cast<size_t>(n) * y.element_size();
    for (int64_t m = 0; m < rows; ++m) std::memcpy(static_cast<char*>(y.data_ptr()) + m * bytes, row.data_ptr(), bytes);
  }
  expand(y, unit_rows(s_in), b, b.stride(1), b.stride(0), Drop{}, 1.0, w || bias);
  return y;
}

Tensor lora_dx(const Tensor dy, const std::optional<Tensor> w, const Tensor ds_in, const Tensor a,
               const std::optional<Tensor> mask, double p, const std::optional<Tensor> seed, int64_t child) {
  const char* op = "lora_dx";
  check_matrix(op, "dy", dy, -1, -1);
  check_floating(op, "dy", dy);
  check_matrix(op, "a", a, -1, -1);
  check_floating(op, "a", a);
  const int64_t rows = dy.size(0), cols = a.size(1);
  check_matrix(op, "ds", ds_in, rows, a.size(0));
  check_dtype(op, "ds", ds_in, dy.scalar_type());
  if (w) {
    check_matrix(op, "w", *w, dy.size(1), cols);
    check_dtype(op, "w", *w, dy.scalar_type());
  }
  const Drop drop = make_drop(op, rows, cols, p, mask, seed, child);
  Tensor dx = empty(dy, dy.scalar_type(), rows, cols);
  if (rows == 0 || cols == 0) return dx;
  if (w) check_call(aoti_torch_cpu_mm_out(dx.get(), dy.get(), w->get()), op, "mm");
  expand(dx, unit_rows(ds_in), a, a.stride(0), a.stride(1), drop, inverse(p), w.has_value());
  return dx;
}

}  // namespace

}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lm::lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&lm::lora_expand));
  m.impl("lora_dx", TORCH_BOX(&lm::lora_dx));
  m.impl("lora_dy", TORCH_BOX(&lm::lora_dy));
  m.impl("lora_masked_expand_", TORCH_BOX(&lm::lora_masked_expand));
  m.impl("lora_da", TORCH_BOX(&lm::lora_da));
}
