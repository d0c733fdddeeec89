// CPU operators of the lora family over a batch of many adapters (schemas and references: lowmem/ops/lora_multi.py):
// one problem an adapter for each pass of lora_run.h, all in one parallel region. Rows in any order are read and
// written where they are, by an index; only the thin S and dS are gathered.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/philox.h"
#include "cpu/lora_run.h"

namespace lm {
namespace {

// One adapter that owns rows: `rows` positions from `low`, and its line of the table.
struct Segment {
  size_t adapter;
  int64_t low, rows;
  uint32_t threshold;
  double scale, inv_keep, scale_inv_keep;
};

double number(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The rows of a batch by adapter.
struct Batch {
  const int64_t* order = nullptr;  // position to row, or null: itself
  std::vector<Segment> segments;
  bool covers = true;  // every row belongs to an adapter

  Batch(const char* op, int64_t rows, size_t count, const Tensor& table, const std::optional<Tensor>& ordering,
        const Tensor& offsets) {
    check_matrix(op, "table", table, static_cast<int64_t>(count), 6);
    check_dtype(op, "table", table, ScalarType::Long);
    check_dtype(op, "offsets", offsets, ScalarType::Long);
    const int64_t size = static_cast<int64_t>(count) + 1;
    if (offsets.dim() != 1 || offsets.size(0) != size || !offsets.is_contiguous() || !table.is_contiguous()) {
      bad(op, "offsets", "a contiguous vector of " + std::to_string(size), shape_text(offsets));
    }
    if (ordering) {
      check_dtype(op, "order", *ordering, ScalarType::Long);
      if (ordering->dim() != 1 || ordering->size(0) != rows || !ordering->is_contiguous()) {
        bad(op, "order", "a contiguous vector of " + std::to_string(rows), shape_text(*ordering));
      }
      order = static_cast<const int64_t*>(ordering->data_ptr());
      for (int64_t i = 0; i < rows; ++i) {
        if (order[i] < 0 || order[i] >= rows) {
          bad(op, "order", "numbers in [0, " + std::to_string(rows) + ")", order[i]);
        }
      }
    }
    const int64_t* ends = static_cast<const int64_t*>(offsets.data_ptr());
    const int64_t* lines = static_cast<const int64_t*>(table.data_ptr());
    if (ends[0] < 0) bad(op, "offsets", "no negative number", ends[0]);
    for (size_t j = 0; j < count; ++j, lines += 6) {
      if (ends[j + 1] < ends[j] || ends[j + 1] > rows) {
        bad(op, "offsets", "ascending numbers up to " + std::to_string(rows), ends[j + 1]);
      }
      if (ends[j + 1] == ends[j]) continue;
      segments.push_back(Segment{j, ends[j], ends[j + 1] - ends[j], static_cast<uint32_t>(lines[2]), number(lines[3]),
                                 number(lines[4]), number(lines[5])});
    }
    covers = ends[0] == 0 && ends[count] == rows;
  }

  // Where a segment's rows of a matrix start, and their index from there.
  template <class T>
  T* base(T* data, const Segment& s, int64_t row_bytes) const {
    return order ? data : static_cast<T*>(at(data, s.low * row_bytes));
  }
  const int64_t* index(const Segment& s) const { return order ? order + s.low : nullptr; }

  Drop drop(const Segment& s, int64_t cols, bool active, uint32_t* mask, const int64_t* seeds) const {
    Drop drop;
    drop.cols = cols, drop.words = ceil_div(cols, 32);
    drop.active = active && s.threshold > 0;
    drop.threshold = s.threshold;
    if (mask) drop.mask = order ? mask : mask + s.low * drop.words;
    if (seeds) drop.seed = static_cast<uint64_t>(seeds[s.adapter]);
    return drop;
  }
};

// Rows by position: `t` itself, or its rows gathered in `order`.
struct Positions {
  const Tensor t;  // kept alive: it may be a copy made for its strides
  Buffer gathered;
  const void* data;
  int64_t ld;
  Positions(const Batch& batch, const Tensor& given) : t(unit_rows(given)), data(t.data_ptr()), ld(t.stride(0)) {
    if (!batch.order) return;
    const int64_t width = t.size(1), size = static_cast<int64_t>(t.element_size());
    gathered = allocate(t.size(0) * width * size);
    for (const Segment& s : batch.segments) {
      for (int64_t m = s.low; m < s.low + s.rows; ++m) {
        std::memcpy(at(gathered.get(), m * width * size), at(data, batch.order[m] * ld * size),
                    static_cast<size_t>(width * size));
      }
    }
    data = gathered.get();
    ld = width;
  }
};

// A contiguous result [rows, width] that is written by position: in place, or in a buffer whose rows move to their
// places. Zero where nothing is written.
struct Result {
  const Batch& batch;
  const Tensor& t;
  Buffer buffer;
  void* data;
  Result(const Batch& b, const Tensor& out) : batch(b), t(out), data(out.data_ptr()) {
    fill_zero(t);
    if (!batch.order) return;
    const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
    buffer = allocate(static_cast<int64_t>(bytes));
    std::memset(buffer.get(), 0, bytes);
    data = buffer.get();
  }
  void finish() const {
    if (!batch.order) return;
    const int64_t bytes = t.size(1) * static_cast<int64_t>(t.element_size());
    for (const Segment& s : batch.segments) {
      for (int64_t m = s.low; m < s.low + s.rows; ++m) {
        std::memcpy(at(t.data_ptr(), batch.order[m] * bytes), at(data, m * bytes), static_cast<size_t>(bytes));
      }
    }
  }
};

const int64_t* seeds_of(const char* op, const std::optional<Tensor>& seeds, size_t count, bool needed) {
  if (!needed) return nullptr;
  if (!seeds) bad(op, "seeds", "int64, one an adapter, since there is dropout", "None");
  check_dtype(op, "seeds", *seeds, ScalarType::Long);
  if (seeds->dim() != 1 || seeds->size(0) != static_cast<int64_t>(count) || !seeds->is_contiguous()) {
    bad(op, "seeds", "a contiguous vector of " + std::to_string(count), shape_text(*seeds));
  }
  return static_cast<const int64_t*>(seeds->data_ptr());
}

uint32_t* mask_of(const char* op, const std::optional<Tensor>& mask, int64_t rows, int64_t cols, bool drop) {
  if (!mask || !drop) return nullptr;
  check_matrix(op, "mask", *mask, rows, ceil_div(cols, 32));
  check_dtype(op, "mask", *mask, ScalarType::Int);
  if (!mask->is_contiguous()) bad(op, "mask", "a contiguous tensor", "strides");
  return static_cast<uint32_t*>(mask->data_ptr());
}

// The matrices of one factor: [r, cols] or, `by_columns`, [cols, r]. Returns the largest r.
int64_t check_factors(const char* op, const char* name, const std::vector<Tensor>& all, int64_t cols, bool by_columns) {
  int64_t widest = 0;
  for (const Tensor& one : all) {
    by_columns ? check_matrix(op, name, one, cols, -1) : check_matrix(op, name, one, -1, cols);
    check_floating(op, name, one);
    const int64_t r = one.size(by_columns ? 1 : 0);
    widest = r > widest ? r : widest;
  }
  return widest;
}

void check_thin(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t width, ScalarType type) {
  check_matrix(op, name, t, rows, -1);
  check_dtype(op, name, t, type);
  if (t.size(1) < width) bad(op, name, "at least " + std::to_string(width) + " columns", shape_text(t));
}

// Bits of a row in which every element is kept.
void keep_all(uint32_t* row, int64_t cols) {
  for (int64_t w = 0; w < ceil_div(cols, 32); ++w) row[w] = cols - w * 32 < 32 ? (1u << (cols - w * 32)) - 1u : ~0u;
}

std::tuple<Tensor, Tensor> lora_multi_shrink(const Tensor x_in, const std::vector<Tensor> a, const Tensor table,
                                             const std::optional<Tensor> seeds, const std::optional<Tensor> order,
                                             const Tensor offsets, bool drop, bool save_mask) {
  const char* op = "lora_multi_shrink";
  check_matrix(op, "x", x_in, -1, -1);
  check_floating(op, "x", x_in);
  const int64_t rows = x_in.size(0), cols = x_in.size(1), width = check_factors(op, "a", a, cols, false);
  const Batch batch(op, rows, a.size(), table, order, offsets);
  const int64_t* seed = seeds_of(op, seeds, a.size(), drop);
  const Tensor x = unit_rows(x_in);
  const int64_t size = static_cast<int64_t>(x.element_size()), words = ceil_div(cols, 32);
  const Tensor s = empty(x, x.scalar_type(), rows, width);
  const bool save = save_mask && drop;
  const Tensor mask = save ? empty(x, ScalarType::Int, rows, words) : empty_vector(x, ScalarType::Int);
  uint32_t* bits = save ? static_cast<uint32_t*>(mask.data_ptr()) : nullptr;
  if (save && !batch.covers) fill_zero(mask);
  const Result result(batch, s);
  std::vector<DotTask> tasks;
  for (const Segment& one : batch.segments) {
    const Tensor& m = a[one.adapter];
    const Drop dropped = batch.drop(one, cols, drop, nullptr, seed);
    uint32_t* saved = save ? (order ? bits : bits + one.low * words) : nullptr;
    DotArgs args{batch.base(x.data_ptr(), one, x.stride(0) * size),
                 batch.index(one),
                 x.stride(0),
                 cols,
                 dropped,
                 dropped.active ? saved : nullptr,
                 nullptr,
                 0,
                 dropped.active ? one.scale_inv_keep : one.scale,
                 at(result.data, one.low * width * size),
                 width};
    tasks.push_back(DotTask{args, one.rows, thin(m, cols, m.size(0), m.stride(1), m.stride(0))});
    for (int64_t i = 0; saved && !dropped.active && i < one.rows; ++i) {
      keep_all(saved + row_at(args.index, i) * words, cols);
    }
  }
  run_dot(x, tasks);
  result.finish();
  return std::make_tuple(s, mask);
}

void lora_multi_expand(Tensor out, const Tensor s_in, const std::vector<Tensor> a, const Tensor table,
                       const std::optional<Tensor> mask, const std::optional<Tensor> seeds,
                       const std::optional<Tensor> order, const Tensor offsets, bool drop) {
  const char* op = "lora_multi_expand_";
  check_matrix(op, "out", out, -1, -1);
  check_floating(op, "out", out);
  const int64_t rows = out.size(0), cols = out.size(1);
  check_thin(op, "s", s_in, rows, check_factors(op, "a", a, cols, false), out.scalar_type());
  const Batch batch(op, rows, a.size(), table, order, offsets);
  uint32_t* bits = mask_of(op, mask, rows, cols, drop);
  const int64_t* seed = seeds_of(op, seeds, a.size(), drop && !mask);
  if (rows == 0 || cols == 0) return;
  const Positions s(batch, s_in);
  Tensor target = unit_rows(out);
  const int64_t size = static_cast<int64_t>(out.element_size());
  std::vector<ExpandTask> tasks;
  for (const Segment& one : batch.segments) {
    const Tensor& m = a[one.adapter];
    const int64_t r = m.size(0);
    const Drop dropped = batch.drop(one, cols, drop, bits, seed);
    const ExpandArgs args{batch.base(target.data_ptr(), one, target.stride(0) * size),
                          batch.index(one),
                          target.stride(0),
                          cols,
                          at(s.data, one.low * s.ld * size),
                          s.ld,
                          r,
                          dropped,
                          nullptr,
                          dropped.active ? one.inv_keep : 1.0,
                          true};
    tasks.push_back(ExpandTask{args, one.rows, thin(m, r, cols, m.stride(0), m.stride(1))});
  }
  run_expand(target, tasks);
  if (target.data_ptr() != out.data_ptr()) torch::stable::copy_(out, target);
}

std::tuple<Tensor, Tensor> lora_multi_dy(const Tensor dy_in, const std::vector<Tensor> b, const Tensor s_in,
                                         const Tensor table, const std::optional<Tensor> order, const Tensor offsets) {
  const char* op = "lora_multi_dy";
  check_matrix(op, "dy", dy_in, -1, -1);
  check_floating(op, "dy", dy_in);
  const int64_t rows = dy_in.size(0), cols = dy_in.size(1), width = check_factors(op, "b", b, cols, true);
  check_thin(op, "s", s_in, rows, width, dy_in.scalar_type());
  const Batch batch(op, rows, b.size(), table, order, offsets);
  const Tensor dy = unit_rows(dy_in);
  int64_t total = 0;
  std::vector<int64_t> starts;
  for (const Tensor& one : b) starts.push_back(total), total += one.numel();
  const ScalarType wide = accumulate_dtype(dy.scalar_type());
  const Tensor ds = empty(dy, dy.scalar_type(), rows, width), db = empty_vector(dy, wide, total);
  const int64_t size = static_cast<int64_t>(dy.element_size()), wide_size = static_cast<int64_t>(db.element_size());
  if (batch.segments.size() < b.size() || cols == 0) fill_zero(db);
  const Result result(batch, ds);
  const Positions s(batch, s_in);
  std::vector<DotTask> dots;
  std::vector<PassTask> passes;
  for (const Segment& one : batch.segments) {
    const Tensor& m = b[one.adapter];
    const int64_t r = m.size(1);
    const bool fused = r <= kFusedRank;
    const Thin p = thin(m, cols, r, m.stride(0), m.stride(1));
    const Thin q{at(s.data, one.low * s.ld * size), dtype_of(dy), one.rows, r, s.ld, 1};
    const void* y = batch.base(static_cast<const void*>(dy.data_ptr()), one, dy.stride(0) * size);
    void* to = at(result.data, one.low * width * size);
    if (!fused) {
      dots.push_back(
          DotTask{DotArgs{y, batch.index(one), dy.stride(0), cols, Drop{}, nullptr, nullptr, 0, one.scale, to, width},
                  one.rows, p});
    }
    PassArgs args{};
    args.y = y, args.index = batch.index(one), args.ld = dy.stride(0), args.cols = cols;
    passes.push_back(PassTask{args, one.rows, q, p, fused, false,
                              Sum{at(db.data_ptr(), starts[one.adapter] * wide_size), dtype_of(db), r, 1.0},
                              Sum{to, dtype_of(ds), width, one.scale}});
  }
  if (cols > 0) {
    if (!dots.empty()) run_dot(dy, dots);
    run_pass(dy, passes);
  }
  result.finish();
  return std::make_tuple(ds, db);
}

Tensor lora_multi_da(const Tensor ds_in, const Tensor x_in, const std::vector<int64_t> ranks, const Tensor table,
                     const std::optional<Tensor> mask, const std::optional<Tensor> seeds,
                     const std::optional<Tensor> order, const Tensor offsets, bool drop) {
  const char* op = "lora_multi_da";
  check_matrix(op, "x", x_in, -1, -1);
  check_floating(op, "x", x_in);
  const int64_t rows = x_in.size(0), cols = x_in.size(1);
  int64_t total = 0, width = 0;
  std::vector<int64_t> starts;
  for (int64_t r : ranks) {
    if (r < 1) bad(op, "ranks", "positive numbers", r);
    starts.push_back(total), total += r, width = r > width ? r : width;
  }
  check_thin(op, "ds", ds_in, rows, width, x_in.scalar_type());
  const Batch batch(op, rows, ranks.size(), table, order, offsets);
  uint32_t* bits = mask_of(op, mask, rows, cols, drop);
  const int64_t* seed = seeds_of(op, seeds, ranks.size(), drop && !mask);
  const Tensor x = unit_rows(x_in);
  const Tensor da = empty(x, accumulate_dtype(x.scalar_type()), total, cols);
  const int64_t size = static_cast<int64_t>(x.element_size()), wide_size = static_cast<int64_t>(da.element_size());
  if (batch.segments.size() < ranks.size()) fill_zero(da);
  const Positions ds(batch, ds_in);
  std::vector<PassTask> tasks;
  for (const Segment& one : batch.segments) {
    const int64_t r = ranks[one.adapter];
    PassArgs args{};
    args.y = batch.base(static_cast<const void*>(x.data_ptr()), one, x.stride(0) * size);
    args.index = batch.index(one), args.ld = x.stride(0), args.cols = cols;
    args.drop = batch.drop(one, cols, drop, bits, seed);
    const double alpha = args.drop.active ? one.inv_keep : 1.0;
    tasks.push_back(PassTask{
        args, one.rows, Thin{at(ds.data, one.low * ds.ld * size), dtype_of(x), one.rows, r, ds.ld, 1}, Thin{}, false,
        true, Sum{at(da.data_ptr(), starts[one.adapter] * cols * wide_size), dtype_of(da), cols, alpha}, Sum{}});
  }
  if (cols > 0) run_pass(x, tasks);
  return da;
}

}  // namespace
}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("lora_multi_shrink", TORCH_BOX(&lm::lora_multi_shrink));
  m.impl("lora_multi_expand_", TORCH_BOX(&lm::lora_multi_expand));
  m.impl("lora_multi_dy", TORCH_BOX(&lm::lora_multi_dy));
  m.impl("lora_multi_da", TORCH_BOX(&lm::lora_multi_da));
}
