// CPU operators of the lora family (schemas, formulas and references: lowmem/ops/lora.py): argument checks, packing of
// the thin operands, and the partition of the work. The loops themselves are in lora_kernels.h.
//
// The partition of every sum depends on the shapes alone and partial sums are added in order: the bits of a result do
// not depend on the number of threads.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/philox.h"
#include "cpu/isa.h"
#include "cpu/lora_impl.h"
#include "cpu/lora_pack.h"

namespace lm {
namespace {

constexpr int64_t kColumnChunk = 1024;       // columns of one block of a pass: a multiple of every tile's width
constexpr int64_t kRowBlock = 32;            // rows of a tile (kTileRows)
constexpr int64_t kFusedRank = 64;           // above it the two sums over dy run apart: they are bound by arithmetic
constexpr int64_t kExpandBytes = 256 << 10;  // of panels that one sweep over the rows keeps in the second-level cache
// Less than this is not divided: a parallel region costs microseconds, and far more where other programs hold the
// cores.
constexpr int64_t kSerialWork = 1 << 20;   // multiply-adds
constexpr int64_t kSerialMoves = 1 << 17;  // elements packed or summed

const LoraIsa* choose_lora_isa() {
  const LoraIsa* const tables[kIsaLevels] = {lora_plain(), lora_avx2(), lora_avx512(), lora_avx512_bf16()};
  return choose_isa(tables);
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    default: return kFloat16;
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(bytes > 0 ? bytes : 64)) != 0) throw std::bad_alloc();
  return Buffer(p);
}

Tensor empty(const Tensor& like, ScalarType type, int64_t rows, int64_t cols) {
  int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  const int64_t sizes[2] = {rows, cols}, strides[2] = {cols > 1 ? cols : 1, 1};
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const bool matrix = cols >= 0;
  if (aoti_torch_empty_strided(matrix ? 2 : 1, sizes, matrix ? strides : strides + 1, dtype, device_type, device_index,
                               &handle)) {
    throw std::bad_alloc();
  }
  return Tensor(handle);
}

Tensor empty_vector(const Tensor& like, ScalarType type) { return empty(like, type, 0, -1); }

// The same matrix with neighbouring elements in a row.
Tensor unit_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t); }

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

Thin thin(const Tensor& t, int64_t depth, int64_t columns, int64_t sk, int64_t sj) {
  return Thin{t.data_ptr(), dtype_of(t), depth, columns, sk, sj};
}

// `m` in panels for products with a matrix of dtype `round`: adapters of another dtype are rounded to it first, as in
// the reference, so that every instruction set computes with the same numbers.
Buffer panels(const LoraKernels& kernels, Dtype round, const Thin& m) {
  const int64_t steps = ceil_div(m.depth, pair_of(kernels.element));
  const int64_t columns = ceil_div(m.columns, 2 * kPanel) * 2 * kPanel;  // the rank-r update reads panels by twos
  Buffer buffer = allocate(steps * columns * element_size(kernels.element));
  void* dst = buffer.get();
  const int64_t grain = 1 + kSerialMoves / columns;
  torch::stable::parallel_for(0, steps, grain,
                              [&](int64_t t0, int64_t t1) { pack(kernels.element, round, m, dst, t0, t1); });
  return buffer;
}

const LoraKernels& kernels_for(const Tensor& t) { return lora_isa().types[dtype_of(t)]; }

// ---------------------------------------------------------------------------------------------------- rows dot panels

// out[m, 0..rank-1] = alpha * drop(x) P, P given as `p`; rows in blocks over the threads.
void run_dot(const Tensor& x, const Drop& drop, uint32_t* save, const Thin& p, double alpha, const Tensor& out) {
  const LoraKernels& kernels = kernels_for(x);
  const int64_t rows = x.size(0), cols = x.size(1), steps = ceil_div(cols, pair_of(kernels.element));
  const Buffer packed = panels(kernels, dtype_of(x), p);
  for (int64_t j0 = 0; j0 < p.columns; j0 += kRankBlock) {
    const int64_t rank = p.columns - j0 < kRankBlock ? p.columns - j0 : kRankBlock;
    DotArgs args{x.data_ptr(),
                 x.stride(0),
                 cols,
                 drop,
                 j0 == 0 ? save : nullptr,
                 static_cast<const char*>(packed.get()) + j0 * steps * element_size(kernels.element),
                 rank,
                 alpha,
                 static_cast<char*>(out.data_ptr()) + j0 * static_cast<int64_t>(out.element_size()),
                 out.stride(0)};
    const int64_t grain = 1 + kSerialWork / (kMaxWidth * (cols + 1) * (rank + kPanel));
    torch::stable::parallel_for(0, ceil_div(rows, kMaxWidth), grain, [&](int64_t b0, int64_t b1) {
      const int64_t end = b1 * kMaxWidth;
      kernels.dot(args, b0 * kMaxWidth, end < rows ? end : rows);
    });
  }
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
  if (rows > 0) run_dot(x, drop, bits, thin(a, cols, r, a.stride(1), a.stride(0)), scale * inverse(p), s);
  return std::make_tuple(s, mask);
}

// ------------------------------------------------------------------------------------------------- sums over the rows

// The blocks of a pass over [rows, cols]: chosen from the shape alone.
struct Blocks {
  int64_t column_chunks, row_chunks, chunk_rows;
  Blocks(int64_t rows, int64_t cols) {
    column_chunks = ceil_div(cols, kColumnChunk);
    const int64_t wanted = column_chunks > 0 ? ceil_div(16, column_chunks) : 1, most = ceil_div(rows, 256);
    row_chunks = wanted < most ? wanted : most;
    if (row_chunks < 1) row_chunks = 1;
    chunk_rows = ceil_div(ceil_div(rows, row_chunks), kRowBlock) * kRowBlock;
    if (chunk_rows > 0) row_chunks = ceil_div(rows, chunk_rows);
  }
};

template <class C>
void sum_to(const Buffer& parts, int64_t chunks, int64_t rows, int64_t rank_pad, int64_t rank, double alpha,
            const Tensor& out, bool transposed) {
  const C* from = static_cast<const C*>(parts.get());
  const C factor = static_cast<C>(alpha);
  void* to = out.data_ptr();
  const Dtype type = dtype_of(out);
  torch::stable::parallel_for(0, rows, 1 + kSerialMoves / (chunks * rank_pad), [&](int64_t i0, int64_t i1) {
    if (type == kBFloat16) {
      sum_parts(from, chunks, rows, rank_pad, rank, factor, static_cast<BFloat16*>(to), transposed, i0, i1);
    } else if (type == kFloat16) {
      sum_parts(from, chunks, rows, rank_pad, rank, factor, static_cast<Half*>(to), transposed, i0, i1);
    } else {
      sum_parts(from, chunks, rows, rank_pad, rank, factor, static_cast<C*>(to), transposed, i0, i1);
    }
  });
}

// outer = drop(y)^T q in `out` ([cols, rank], or [rank, cols] when `transposed`), and with `p` also
// dot = alpha_dot * y P in `dot_out`, in one read of y.
void run_pass(const Tensor& y, const Drop& drop, const Thin& q, const Thin* p, double alpha_outer, const Tensor& out,
              bool transposed, double alpha_dot, const Tensor* dot_out) {
  const LoraKernels& kernels = kernels_for(y);
  const int64_t rows = y.size(0), cols = y.size(1), rank = q.columns, pad = ceil_div(rank, kPanel) * kPanel;
  const Blocks blocks(rows, cols);
  const int64_t size = y.scalar_type() == ScalarType::Double ? 8 : 4;
  const Buffer thin_panels = panels(kernels, dtype_of(y), q);
  const Buffer dot_panels = p ? panels(kernels, dtype_of(y), *p) : Buffer();
  const Buffer outer = allocate(blocks.row_chunks * cols * pad * size);
  const Buffer dot = p ? allocate(blocks.column_chunks * rows * pad * size) : Buffer();
  const int pair = pair_of(kernels.element);
  const int64_t tasks = blocks.column_chunks * blocks.row_chunks;
  const int64_t work =
      (rows < blocks.chunk_rows ? rows : blocks.chunk_rows) * (cols < kColumnChunk ? cols : kColumnChunk) * pad;
  torch::stable::parallel_for(0, tasks, 1 + kSerialWork / (work + 1), [&](int64_t t0, int64_t t1) {
    for (int64_t task = t0; task < t1; ++task) {
      const int64_t cc = task / blocks.row_chunks, rc = task % blocks.row_chunks;
      const int64_t row0 = rc * blocks.chunk_rows, col0 = cc * kColumnChunk;
      const int64_t row1 = row0 + blocks.chunk_rows, col1 = col0 + kColumnChunk;
      PassArgs args{y.data_ptr(),
                    y.stride(0),
                    cols,
                    drop,
                    dot_panels.get(),
                    thin_panels.get(),
                    ceil_div(cols, pair),
                    ceil_div(rows, pair),
                    pad,
                    p ? static_cast<char*>(dot.get()) + cc * rows * pad * size : nullptr,
                    static_cast<char*>(outer.get()) + rc * cols * pad * size};
      kernels.pass(args, row0, row1 < rows ? row1 : rows, col0, col1 < cols ? col1 : cols);
    }
  });
  if (size == 8) {
    sum_to<double>(outer, blocks.row_chunks, cols, pad, rank, alpha_outer, out, transposed);
    if (p) sum_to<double>(dot, blocks.column_chunks, rows, pad, rank, alpha_dot, *dot_out, false);
  } else {
    sum_to<float>(outer, blocks.row_chunks, cols, pad, rank, alpha_outer, out, transposed);
    if (p) sum_to<float>(dot, blocks.column_chunks, rows, pad, rank, alpha_dot, *dot_out, false);
  }
}

void fill_zero(const Tensor& t) {
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
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
  if (!fused) run_dot(dy, Drop{}, nullptr, p, scale, ds);
  run_pass(dy, Drop{}, q, fused ? &p : nullptr, 1.0, db, false, scale, fused ? &ds : nullptr);
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
  run_pass(x, drop, thin(ds, rows, r, ds.stride(0), ds.stride(1)), nullptr, inverse(p), da, true, 0.0, nullptr);
  return da;
}

// ------------------------------------------------------------------------------------------------- rank-r update

// out = accumulate * out + alpha * keep * (d P), P [rank, cols] at data[j * sj + c * sc]; out has unit stride in its
// rows.
void run_expand(const Tensor& out, const Tensor& d, const Tensor& p, int64_t sj, int64_t sc, const Drop& drop,
                double alpha, bool accumulate) {
  const LoraKernels& kernels = kernels_for(out);
  const int64_t rows = out.size(0), cols = out.size(1), rank = d.size(1);
  const Buffer packed = panels(kernels, dtype_of(out), thin(p, rank, cols, sj, sc));
  const ExpandArgs args{out.data_ptr(), out.stride(0), cols,         d.data_ptr(), d.stride(0),
                        rank,           drop,          packed.get(), alpha,        accumulate};
  const int64_t column_bytes = (ceil_div(rank, pair_of(kernels.element)) + 1) * element_size(kernels.element);
  const int64_t chunk = ceil_div(kExpandBytes / column_bytes + 1, 1024) * 1024;
  const int64_t row_blocks = ceil_div(rows, kMaxWidth), chunks = ceil_div(cols, chunk);
  const int64_t grain = 1 + kSerialWork / (kMaxWidth * (cols < chunk ? cols : chunk) * (rank + kPanel));
  torch::stable::parallel_for(0, chunks * row_blocks, grain, [&](int64_t t0, int64_t t1) {
    while (t0 < t1) {  // the row blocks of one column chunk at a time
      const int64_t cc = t0 / row_blocks, b0 = t0 % row_blocks;
      const int64_t b1 = row_blocks - b0 < t1 - t0 ? row_blocks : b0 + (t1 - t0);
      const int64_t row1 = b1 * kMaxWidth < rows ? b1 * kMaxWidth : rows, col1 = (cc + 1) * chunk;
      kernels.expand(args, b0 * kMaxWidth, row1, cc * chunk, col1 < cols ? col1 : cols);
      t0 += b1 - b0;
    }
  });
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
  run_expand(target, ds, a, a.stride(0), a.stride(1), drop, inverse(p), accumulate);
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
  run_expand(y, unit_rows(s_in), b, b.stride(1), b.stride(0), Drop{}, 1.0, w || bias);
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
  run_expand(dx, unit_rows(ds_in), a, a.stride(0), a.stride(1), drop, inverse(p), w.has_value());
  return dx;
}

}  // namespace

const LoraIsa& lora_isa() {
  static const LoraIsa* const isa = choose_lora_isa();
  return *isa;
}

}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lm::lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&lm::lora_expand));
  m.impl("lora_dx", TORCH_BOX(&lm::lora_dx));
  m.impl("lora_dy", TORCH_BOX(&lm::lora_dy));
  m.impl("lora_masked_expand_", TORCH_BOX(&lm::lora_masked_expand));
  m.impl("lora_da", TORCH_BOX(&lm::lora_da));
}
