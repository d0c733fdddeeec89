// CPU operators of the activation family (schemas, formulas and references: lowmem/ops/activation.py and
// lowmem/ops/activation_loss.py): argument checks and the partition of the work over the threads.
//
// Rows are independent; sums over rows (dw, db of a norm) go over chunks that follow from the shape alone and are added
// in order, so the bits of a result do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/fp8.h"
#include "cpu/activation_impl.h"

namespace lm {

void* activation_scratch(int64_t bytes, int which) {
  thread_local std::vector<double> rows[2];
  const size_t need = static_cast<size_t>(bytes) / sizeof(double) + 8;
  if (rows[which].size() < need) rows[which].resize(need);
  return rows[which].data();
}

const ActivationIsa& activation_isa() {
  static const ActivationIsa* const found = [] {
    const std::string name = lora_isa().name;
    const ActivationIsa* isa = name == "avx2" ? activation_avx2() : name == "plain" ? nullptr : activation_avx512();
    return isa ? isa : activation_plain();
  }();
  return *found;
}

namespace {

constexpr int64_t kSerial = 1 << 15;  // elements below which a row of threads costs more than it gives
constexpr int64_t kSumChunks = 16;    // of a sum over rows, at most

using Maybe = std::optional<Tensor>;

const ActivationKernels& kernels_of(const char* op, const char* argument, const Tensor& t) {
  check_floating(op, argument, t);
  switch (t.scalar_type()) {
    case ScalarType::Float: return activation_isa().types[kFloat32];
    case ScalarType::Double: return activation_isa().types[kFloat64];
    case ScalarType::BFloat16: return activation_isa().types[kBFloat16];
    default: return activation_isa().types[kFloat16];
  }
}

Tensor with_unit_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t); }

int64_t groups(int64_t cols) { return (cols + kFp8Group - 1) / kFp8Group; }

// Rows [0, rows) over the threads; nothing is called for empty matrices.
template <class Kernel, class Args>
void over_rows(Kernel kernel, const Args& args, int64_t rows, int64_t cols) {
  if (rows == 0 || cols == 0) return;
  torch::stable::parallel_for(0, rows, 1 + kSerial / (cols + 1),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor new_packed(const Tensor& like, int64_t rows, int64_t cols) {
  return torch::stable::new_empty(like, {rows * (cols + groups(cols))}, ScalarType::Byte);
}

Packed parts_of(const Tensor& flat, int64_t rows, int64_t cols) {
  auto* codes = static_cast<uint8_t*>(flat.data_ptr());
  return Packed{codes, codes + rows * cols};
}

Packed packed_of(const char* op, const char* argument, const Tensor& flat, int64_t rows, int64_t cols) {
  check_dtype(op, argument, flat, ScalarType::Byte);
  if (flat.dim() != 1 || flat.size(0) != rows * (cols + groups(cols)) || !flat.is_contiguous()) {
    bad(op, argument, std::to_string(rows * (cols + groups(cols))) + " contiguous bytes", shape_text(flat));
  }
  return parts_of(flat, rows, cols);
}

void check_form(const char* op, int64_t form, int64_t most) {
  if (form < 0 || form > most) bad(op, "form", "a form in [0, " + std::to_string(most) + "]", form);
}

// A vector of `size` in the dtype given: the tensor itself where it is one.
Maybe vector_in(const char* op, const char* argument, const Maybe& t, int64_t size, ScalarType dtype) {
  if (!t) return std::nullopt;
  if (t->dim() != 1 || t->size(0) != size) bad(op, argument, "shape [" + std::to_string(size) + "]", shape_text(*t));
  check_floating(op, argument, *t);
  return torch::stable::contiguous(torch::stable::to(*t, dtype));
}

const void* data_or_null(const Maybe& t) { return t ? t->data_ptr() : nullptr; }

// ------------------------------------------------------------------------------------------------------ cross entropy

void cross_entropy_rows_(Tensor logits, Tensor loss, const Tensor target, const Maybe bias_in, const Maybe factor,
                         int64_t ignore_index, double smoothing, double z_loss, double softcap) {
  const char* op = "cross_entropy_rows_";
  check_matrix(op, "logits", logits, -1, -1);
  const ActivationKernels& kernels = kernels_of(op, "logits", logits);
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const ScalarType acc = accumulate_dtype(logits.scalar_type());
  if (logits.stride(1) != 1 && cols > 1) bad(op, "logits", "neighbouring elements in a row", "other strides");
  check_dtype(op, "loss", loss, acc);
  check_dtype(op, "target", target, ScalarType::Long);
  for (const Tensor* t : std::initializer_list<const Tensor*>{&loss, &target}) {
    if (t->dim() != 1 || t->size(0) != rows) bad(op, "loss, target", "one element a row", shape_text(*t));
  }
  if (!loss.is_contiguous()) bad(op, "loss", "a contiguous vector", "strides");
  if (factor) {
    check_dtype(op, "factor", *factor, acc);
    if (factor->dim() != 1 || factor->size(0) != rows) bad(op, "factor", "one element a row", shape_text(*factor));
  }
  const auto* labels = static_cast<const int64_t*>(target.data_ptr());
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t label = labels[m * target.stride(0)];
    if (label != ignore_index && (label < 0 || label >= cols)) {
      bad(op, "target", "labels in [0, " + std::to_string(cols) + ") or ignore_index", label);
    }
  }
  const Maybe bias = vector_in(op, "bias", bias_in, cols, acc);
  const LossArgs args{logits.data_ptr(),
                      logits.stride(0),
                      cols,
                      loss.data_ptr(),
                      labels,
                      target.stride(0),
                      data_or_null(bias),
                      data_or_null(factor),
                      factor ? factor->stride(0) : 0,
                      ignore_index,
                      smoothing,
                      z_loss,
                      softcap};
  over_rows(kernels.loss, args, rows, cols);
}

// --------------------------------------------------------------------------------------------------------- FP8 groups

Tensor fp8_pack(const Tensor x_in) {
  const char* op = "fp8_pack";
  check_matrix(op, "x", x_in, -1, -1);
  const ActivationKernels& kernels = kernels_of(op, "x", x_in);
  const Tensor x = with_unit_rows(x_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  const Tensor packed = new_packed(x, rows, cols);
  const PackArgs args{x.data_ptr(), nullptr, x.stride(0), cols, parts_of(packed, rows, cols)};
  over_rows(kernels.pack, args, rows, cols);
  return packed;
}

Tensor fp8_unpack(const Tensor packed, int64_t rows, int64_t cols, ScalarType dtype) {
  const char* op = "fp8_unpack";
  if (rows < 0 || cols < 0) bad(op, "rows, cols", "sizes >= 0", rows < cols ? rows : cols);
  const Packed parts = packed_of(op, "packed", packed, rows, cols);
  const Tensor x = torch::stable::new_empty(packed, {rows, cols}, dtype);
  const ActivationKernels& kernels = kernels_of(op, "dtype", x);
  over_rows(kernels.unpack, PackArgs{nullptr, x.data_ptr(), cols, cols, parts}, rows, cols);
  return x;
}

// -------------------------------------------------------------------------------------------------------------- norms

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor x_in, const Maybe residual_in,
                                                        const Maybe weight_in, const Maybe bias_in, double eps,
                                                        bool center, int64_t form) {
  const char* op = "norm_forward";
  check_matrix(op, "x", x_in, -1, -1);
  check_form(op, form, kFp8);
  const ActivationKernels& kernels = kernels_of(op, "x", x_in);
  const Tensor x = with_unit_rows(x_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  const ScalarType acc = accumulate_dtype(x.scalar_type());
  Maybe residual;
  if (residual_in) {
    check_matrix(op, "residual", *residual_in, rows, cols);
    check_dtype(op, "residual", *residual_in, x.scalar_type());
    residual = with_unit_rows(*residual_in);
  }
  const Maybe weight = vector_in(op, "weight", weight_in, cols, acc), bias = vector_in(op, "bias", bias_in, cols, acc);
  const Tensor y = torch::stable::new_empty(x, {rows, cols});
  const Tensor summed = residual ? torch::stable::new_empty(x, {rows, cols}) : torch::stable::new_empty(x, {0});
  const Tensor packed = form == kFp8 ? new_packed(x, rows, cols) : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  const Tensor stats = torch::stable::new_empty(x, {rows, center ? 2 : 1}, acc);
  const NormArgs args{x.data_ptr(),
                      data_or_null(residual),
                      data_or_null(weight),
                      data_or_null(bias),
                      x.stride(0),
                      residual ? residual->stride(0) : 0,
                      cols,
                      y.data_ptr(),
                      residual ? summed.data_ptr() : nullptr,
                      form == kFp8 ? parts_of(packed, rows, cols) : Packed{},
                      stats.data_ptr(),
                      eps,
                      center};
  over_rows(kernels.norm, args, rows, cols);
  return std::make_tuple(y, summed, packed, stats);
}

template <class C>
void add_chunks(const C* parts, int64_t chunks, int64_t cols, C* out) {
  torch::stable::parallel_for(0, cols, 1 + kSerial / (chunks + 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      C total = 0;
      for (int64_t i = 0; i < chunks; ++i) total += parts[i * cols + k];
      out[k] = total;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor dy_in, const Maybe dsum_in, const Tensor saved_in,
                                                 const Maybe weight_in, const Tensor stats, bool center, int64_t form,
                                                 bool need_dw, bool need_db) {
  const char* op = "norm_backward";
  check_matrix(op, "dy", dy_in, -1, -1);
  check_form(op, form, kFp8);
  const ActivationKernels& kernels = kernels_of(op, "dy", dy_in);
  const Tensor dy = with_unit_rows(dy_in);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  const ScalarType acc = accumulate_dtype(dy.scalar_type());
  Maybe dsum, x;
  if (dsum_in) {
    check_matrix(op, "dsum", *dsum_in, rows, cols);
    check_dtype(op, "dsum", *dsum_in, dy.scalar_type());
    dsum = with_unit_rows(*dsum_in);
  }
  if (form == kPlain) {
    check_matrix(op, "saved", saved_in, rows, cols);
    check_dtype(op, "saved", saved_in, dy.scalar_type());
    x = with_unit_rows(saved_in);
  }
  check_matrix(op, "stats", stats, rows, center ? 2 : 1);
  check_dtype(op, "stats", stats, acc);
  if (!stats.is_contiguous()) bad(op, "stats", "a contiguous tensor", "strides");
  const Maybe weight = vector_in(op, "weight", weight_in, cols, acc);
  const Tensor dx = torch::stable::new_empty(dy, {rows, cols});
  const Tensor dw = torch::stable::new_empty(dy, {need_dw ? cols : 0}, acc);
  const Tensor db = torch::stable::new_empty(dy, {need_db ? cols : 0}, acc);
  NormGradArgs args{dy.data_ptr(),
                    data_or_null(dsum),
                    data_or_null(x),
                    dy.stride(0),
                    dsum ? dsum->stride(0) : 0,
                    x ? x->stride(0) : 0,
                    cols,
                    form == kFp8 ? packed_of(op, "saved", saved_in, rows, cols) : Packed{},
                    data_or_null(weight),
                    stats.data_ptr(),
                    dx.data_ptr(),
                    nullptr,
                    nullptr,
                    center};
  if (!need_dw && !need_db) {
    over_rows(kernels.norm_grad, args, rows, cols);
    return std::make_tuple(dx, dw, db);
  }
  const int64_t most = (rows + 15) / 16, chunks = most < kSumChunks ? most : kSumChunks;
  const int64_t each = chunks > 0 ? (rows + chunks - 1) / chunks : 0;
  const int64_t width = acc == ScalarType::Double ? 8 : 4, sums = (need_dw ? 1 : 0) + (need_db ? 1 : 0);
  const Tensor parts = torch::stable::new_empty(dy, {sums * chunks * cols}, acc);
  auto* at = static_cast<char*>(parts.data_ptr());
  if (chunks > 0 && cols > 0) {
    std::memset(at, 0, static_cast<size_t>(sums * chunks * cols * width));
    torch::stable::parallel_for(0, chunks, 1 + kSerial / (each * cols + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        NormGradArgs own = args;
        if (need_dw) own.dw = at + i * cols * width;
        if (need_db) own.db = at + ((need_dw ? chunks : 0) + i) * cols * width;
        kernels.norm_grad(own, i * each, (i + 1) * each < rows ? (i + 1) * each : rows);
      }
    });
  }
  int64_t which = 0;
  for (const auto& [wanted, out] : {std::make_pair(need_dw, &dw), std::make_pair(need_db, &db)}) {
    if (!wanted) continue;
    const char* from = at + which++ * chunks * cols * width;
    if (width == 8) {
      add_chunks(reinterpret_cast<const double*>(from), chunks, cols, static_cast<double*>(out->data_ptr()));
    } else {
      add_chunks(reinterpret_cast<const float*>(from), chunks, cols, static_cast<float*>(out->data_ptr()));
    }
  }
  return std::make_tuple(dx, dw, db);
}

// -------------------------------------------------------------------------------------------------------- activations

int64_t code_bytes(int64_t form, int64_t cols) { return form == kDeriv4 ? (cols + 1) / 2 : (cols + 3) / 4; }

void check_kind(const char* op, int64_t kind) {
  if (kind < 0 || kind >= kKinds) bad(op, "kind", "0 (silu), 1 (gelu) or 2 (gelu_tanh)", kind);
}

std::tuple<Tensor, Tensor> act_forward(const Tensor x_in, int64_t kind, int64_t form) {
  const char* op = "act_forward";
  check_matrix(op, "x", x_in, -1, -1);
  check_kind(op, kind);
  check_form(op, form, kDeriv2);
  const ActivationKernels& kernels = kernels_of(op, "x", x_in);
  const Tensor x = with_unit_rows(x_in);
  const int64_t rows = x.size(0), cols = x.size(1), bytes = code_bytes(form, cols);
  const Tensor y = torch::stable::new_empty(x, {rows, cols});
  const Tensor saved = form == kFp8     ? new_packed(x, rows, cols)
                       : form == kPlain ? torch::stable::new_empty(x, {0}, ScalarType::Byte)
                                        : torch::stable::new_empty(x, {rows, bytes}, ScalarType::Byte);
  ActArgs args{};
  args.x = x.data_ptr(), args.ld_x = x.stride(0), args.cols = cols, args.out = y.data_ptr();
  args.form = static_cast<Form>(form), args.bytes = bytes;
  if (form == kFp8) args.packed = parts_of(saved, rows, cols);
  if (form > kFp8) args.saved = static_cast<uint8_t*>(saved.data_ptr());
  over_rows(kernels.act[kind], args, rows, cols);
  return std::make_tuple(y, saved);
}

Tensor act_backward(const Tensor dy_in, const Tensor saved_in, int64_t kind, int64_t form) {
  const char* op = "act_backward";
  check_matrix(op, "dy", dy_in, -1, -1);
  check_kind(op, kind);
  check_form(op, form, kDeriv2);
  const ActivationKernels& kernels = kernels_of(op, "dy", dy_in);
  const Tensor dy = with_unit_rows(dy_in);
  const int64_t rows = dy.size(0), cols = dy.size(1), bytes = code_bytes(form, cols);
  Tensor saved = saved_in;
  ActArgs args{};
  if (form == kPlain) {
    check_matrix(op, "saved", saved, rows, cols);
    check_dtype(op, "saved", saved, dy.scalar_type());
    saved = with_unit_rows(saved);
    args.x = saved.data_ptr(), args.ld_x = saved.stride(0);
  } else if (form == kFp8) {
    args.packed = packed_of(op, "saved", saved, rows, cols);
  } else {
    check_matrix(op, "saved", saved, rows, bytes);
    check_dtype(op, "saved", saved, ScalarType::Byte);
    saved = torch::stable::contiguous(saved);
    args.saved = static_cast<uint8_t*>(saved.data_ptr());
  }
  const Tensor dx = torch::stable::new_empty(dy, {rows, cols});
  args.cols = cols, args.out = dx.data_ptr(), args.dy = dy.data_ptr(), args.ld_dy = dy.stride(0);
  args.form = static_cast<Form>(form), args.bytes = bytes;
  over_rows(kernels.act_grad[kind], args, rows, cols);
  return dx;
}

// ------------------------------------------------------------------------------------------------------------- SwiGLU

Tensor same_matrix(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  check_matrix(op, argument, t, like.size(0), like.size(1));
  check_dtype(op, argument, t, like.scalar_type());
  return with_unit_rows(t);
}

std::tuple<Tensor, Tensor, Tensor> swiglu_forward(const Tensor g_in, const Tensor u_in, int64_t form) {
  const char* op = "swiglu_forward";
  check_matrix(op, "g", g_in, -1, -1);
  check_form(op, form, kFp8);
  const ActivationKernels& kernels = kernels_of(op, "g", g_in);
  const Tensor g = with_unit_rows(g_in), u = same_matrix(op, "u", u_in, g_in);
  const int64_t rows = g.size(0), cols = g.size(1);
  const Tensor h = torch::stable::new_empty(g, {rows, cols});
  const auto saved = [&] {
    return form == kFp8 ? new_packed(g, rows, cols) : torch::stable::new_empty(g, {0}, ScalarType::Byte);
  };
  const Tensor packed_g = saved(), packed_u = saved();
  GluArgs args{};
  args.g = g.data_ptr(), args.u = u.data_ptr(), args.ld_g = g.stride(0), args.ld_u = u.stride(0), args.cols = cols;
  args.h = h.data_ptr();
  if (form == kFp8) args.packed_g = parts_of(packed_g, rows, cols), args.packed_u = parts_of(packed_u, rows, cols);
  over_rows(kernels.glu, args, rows, cols);
  return std::make_tuple(h, packed_g, packed_u);
}

Tensor swiglu_from_fp8(const Tensor packed_g, const Tensor packed_u, int64_t rows, int64_t cols, ScalarType dtype) {
  const char* op = "swiglu_from_fp8";
  if (rows < 0 || cols < 0) bad(op, "rows, cols", "sizes >= 0", rows < cols ? rows : cols);
  GluArgs args{};
  args.packed_g = packed_of(op, "packed_g", packed_g, rows, cols);
  args.packed_u = packed_of(op, "packed_u", packed_u, rows, cols);
  const Tensor h = torch::stable::new_empty(packed_g, {rows, cols}, dtype);
  const ActivationKernels& kernels = kernels_of(op, "dtype", h);
  args.h = h.data_ptr(), args.cols = cols;
  over_rows(kernels.glu, args, rows, cols);
  return h;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor dh_in, const Tensor g_in, const Tensor u_in, int64_t form) {
  const char* op = "swiglu_backward";
  check_matrix(op, "dh", dh_in, -1, -1);
  check_form(op, form, kFp8);
  const ActivationKernels& kernels = kernels_of(op, "dh", dh_in);
  const Tensor dh = with_unit_rows(dh_in);
  const int64_t rows = dh.size(0), cols = dh.size(1);
  GluArgs args{};
  Tensor g = g_in, u = u_in;
  if (form == kFp8) {
    args.packed_g = packed_of(op, "g", g, rows, cols), args.packed_u = packed_of(op, "u", u, rows, cols);
  } else {
    g = same_matrix(op, "g", g_in, dh_in), u = same_matrix(op, "u", u_in, dh_in);
    args.g = g.data_ptr(), args.u = u.data_ptr(), args.ld_g = g.stride(0), args.ld_u = u.stride(0);
  }
  const Tensor dg = torch::stable::new_empty(dh, {rows, cols}), du = torch::stable::new_empty(dh, {rows, cols});
  args.dh = dh.data_ptr(), args.ld_dh = dh.stride(0), args.cols = cols;
  args.dg = dg.data_ptr(), args.du = du.data_ptr();
  over_rows(kernels.glu_grad, args, rows, cols);
  return std::make_tuple(dg, du);
}

}  // namespace
}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&lm::cross_entropy_rows_));
  m.impl("fp8_pack", TORCH_BOX(&lm::fp8_pack));
  m.impl("fp8_unpack", TORCH_BOX(&lm::fp8_unpack));
  m.impl("norm_forward", TORCH_BOX(&lm::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&lm::norm_backward));
  m.impl("act_forward", TORCH_BOX(&lm::act_forward));
  m.impl("act_backward", TORCH_BOX(&lm::act_backward));
  m.impl("swiglu_forward", TORCH_BOX(&lm::swiglu_forward));
  m.impl("swiglu_from_fp8", TORCH_BOX(&lm::swiglu_from_fp8));
  m.impl("swiglu_backward", TORCH_BOX(&lm::swiglu_backward));
}
