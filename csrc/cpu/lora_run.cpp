// See lora_run.h.
#include "cpu/lora_run.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "cpu/isa.h"

namespace lm {
namespace {

constexpr int64_t kColumnChunk = 1024;       // columns of one block of a pass: a multiple of every tile's width
constexpr int64_t kRowBlock = 32;            // rows of a tile (kTileRows)
constexpr int64_t kExpandBytes = 256 << 10;  // of panels that one sweep over the rows keeps in the second-level cache
// Less than this is not divided: a parallel region costs microseconds, and far more where other programs hold the
// cores.
constexpr int64_t kSerialWork = 1 << 20;   // multiply-adds
constexpr int64_t kSerialMoves = 1 << 17;  // elements packed or summed

const LoraIsa* choose_lora_isa() {
  const LoraIsa* const tables[kIsaLevels] = {lora_plain(), lora_avx2(), lora_avx512(), lora_avx512_bf16()};
  return choose_isa(tables);
}

// Pieces of many tasks, numbered through.
struct Pieces {
  std::vector<int64_t> ends;  // of each task's pieces
  explicit Pieces(size_t tasks) { ends.reserve(tasks); }
  void add(int64_t count) { ends.push_back((ends.empty() ? 0 : ends.back()) + count); }
  int64_t begin(size_t task) const { return task ? ends[task - 1] : 0; }
  // fn(task, first, last) over the pieces first .. last - 1 of a task, all tasks in one parallel region.
  template <class F>
  void run(int64_t grain, const F& fn) const {
    if (ends.empty()) return;
    torch::stable::parallel_for(0, ends.back(), grain, [&](int64_t i0, int64_t i1) {
      size_t task = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), i0) - ends.begin());
      for (; i0 < i1; ++task) {
        const int64_t first = begin(task), last = std::min(i1, ends[task]);
        if (last > i0) fn(task, i0 - first, last - first);
        i0 = last;
      }
    });
  }
};

// Room for one array a task in one allocation, each on a cache line of its own.
struct Arena {
  Buffer buffer;
  std::vector<int64_t> starts;
  explicit Arena(size_t tasks) { starts.reserve(tasks + 1), starts.push_back(0); }
  void add(int64_t bytes) { starts.push_back(starts.back() + ceil_div(bytes, 64) * 64); }
  void reserve() { buffer = allocate(starts.back()); }
  char* operator[](size_t task) const { return at(buffer.get(), starts[task]); }
};

// Each task's thin matrix in panels for products with a matrix of dtype `round`: adapters of another dtype are rounded
// to it first, as in the reference, so that every instruction set computes with the same numbers. `get(task)` is the
// matrix, or null.
template <class Get>
Arena panels(const LoraKernels& kernels, Dtype round, size_t tasks, const Get& get) {
  Arena arena(tasks);
  Pieces steps(tasks);
  int64_t widest = kPanel;
  for (size_t i = 0; i < tasks; ++i) {
    const Thin* m = get(i);
    // the rank-r update reads panels by twos
    const int64_t columns = m ? ceil_div(m->columns, 2 * kPanel) * 2 * kPanel : 0;
    const int64_t count = m ? ceil_div(m->depth, pair_of(kernels.element)) : 0;
    arena.add(count * columns * element_size(kernels.element));
    steps.add(count);
    widest = std::max(widest, columns);
  }
  arena.reserve();
  steps.run(1 + kSerialMoves / widest, [&](size_t task, int64_t t0, int64_t t1) {
    pack(kernels.element, round, *get(task), arena[task], t0, t1);
  });
  return arena;
}

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

int64_t rank_pad(const PassTask& task) { return ceil_div(task.q.columns, kPanel) * kPanel; }

template <class C>
void sum(const void* parts, int64_t chunks, int64_t rows, int64_t pad, int64_t rank, const Sum& to, bool transposed,
         int64_t i0, int64_t i1) {
  const C* from = static_cast<const C*>(parts);
  const C alpha = static_cast<C>(to.alpha);
  if (to.type == kBFloat16) {
    sum_parts(from, chunks, rows, pad, rank, alpha, static_cast<BFloat16*>(to.out), to.ld, transposed, i0, i1);
  } else if (to.type == kFloat16) {
    sum_parts(from, chunks, rows, pad, rank, alpha, static_cast<Half*>(to.out), to.ld, transposed, i0, i1);
  } else {
    sum_parts(from, chunks, rows, pad, rank, alpha, static_cast<C*>(to.out), to.ld, transposed, i0, i1);
  }
}

}  // namespace

const LoraIsa& lora_isa() {
  static const LoraIsa* const isa = choose_lora_isa();
  return *isa;
}

Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(bytes > 0 ? bytes : 64)) != 0) throw std::bad_alloc();
  return Buffer(p);
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    default: return kFloat16;
  }
}

const LoraKernels& kernels_for(const Tensor& t) { return lora_isa().types[dtype_of(t)]; }

namespace {

Tensor make(const Tensor& like, ScalarType type, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle)) throw std::bad_alloc();
  return Tensor(handle);
}

}  // namespace

Tensor empty(const Tensor& like, ScalarType type, int64_t rows, int64_t cols) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {cols > 1 ? cols : 1, 1};
  return make(like, type, 2, sizes, strides);
}

Tensor empty_vector(const Tensor& like, ScalarType type, int64_t size) {
  const int64_t stride = 1;
  return make(like, type, 1, &size, &stride);
}

void fill_zero(const Tensor& t) {
  if (t.numel() > 0) std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
}

Tensor unit_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t); }

Thin thin(const Tensor& t, int64_t depth, int64_t columns, int64_t sk, int64_t sj) {
  return Thin{t.data_ptr(), dtype_of(t), depth, columns, sk, sj};
}

void run_dot(const Tensor& x, std::vector<DotTask>& tasks) {
  const LoraKernels& kernels = kernels_for(x);
  const int64_t cols = x.size(1), steps = ceil_div(cols, pair_of(kernels.element));
  const int64_t element = static_cast<int64_t>(x.element_size());
  const Arena packed = panels(kernels, dtype_of(x), tasks.size(), [&](size_t i) { return &tasks[i].p; });
  Pieces pieces(tasks.size());
  int64_t widest = 0;
  for (const DotTask& task : tasks) {
    pieces.add(ceil_div(task.rows, kMaxWidth) * ceil_div(task.p.columns, kRankBlock));
    widest = std::max(widest, std::min<int64_t>(task.p.columns, kRankBlock));
  }
  pieces.run(1 + kSerialWork / (kMaxWidth * (cols + 1) * (widest + kPanel)), [&](size_t i, int64_t t0, int64_t t1) {
    const DotTask& task = tasks[i];
    const int64_t row_blocks = ceil_div(task.rows, kMaxWidth);
    while (t0 < t1) {  // the row blocks of one block of ranks at a time
      const int64_t j0 = t0 / row_blocks * kRankBlock, b0 = t0 % row_blocks, b1 = std::min(row_blocks, b0 + t1 - t0);
      DotArgs args = task.args;
      if (j0 > 0) args.save = nullptr;
      args.panels = packed[i] + j0 * steps * element_size(kernels.element);
      args.rank = std::min<int64_t>(task.p.columns - j0, kRankBlock);
      args.out = at(args.out, j0 * element);
      kernels.dot(args, b0 * kMaxWidth, std::min(b1 * kMaxWidth, task.rows));
      t0 += b1 - b0;
    }
  });
}

void run_pass(const Tensor& y, std::vector<PassTask>& tasks) {
  const LoraKernels& kernels = kernels_for(y);
  const Dtype round = dtype_of(y);
  const int64_t size = round == kFloat64 ? 8 : 4, pair = pair_of(kernels.element);
  const size_t n = tasks.size();
  const Arena thin_panels = panels(kernels, round, n, [&](size_t i) { return &tasks[i].q; });
  const Arena dot_panels = panels(kernels, round, n, [&](size_t i) { return tasks[i].both ? &tasks[i].p : nullptr; });
  Arena outer(n), dot(n);
  Pieces pieces(n), columns(n), rows(n);
  std::vector<Blocks> blocks;
  blocks.reserve(n);
  int64_t work = 1, outer_moves = 1, dot_moves = 1;
  for (const PassTask& task : tasks) {
    const int64_t pad = rank_pad(task), cols = task.args.cols;
    blocks.emplace_back(task.rows, cols);
    const Blocks& b = blocks.back();
    outer.add(b.row_chunks * cols * pad * size);
    dot.add(task.both ? b.column_chunks * task.rows * pad * size : 0);
    pieces.add(b.column_chunks * b.row_chunks);
    columns.add(cols);
    rows.add(task.both ? task.rows : 0);
    work = std::max(work, std::min(task.rows, b.chunk_rows) * std::min(cols, kColumnChunk) * pad);
    outer_moves = std::max(outer_moves, b.row_chunks * pad);
    dot_moves = std::max(dot_moves, b.column_chunks * pad);
  }
  outer.reserve(), dot.reserve();
  pieces.run(1 + kSerialWork / (work + 1), [&](size_t i, int64_t t0, int64_t t1) {
    const PassTask& task = tasks[i];
    const Blocks& b = blocks[i];
    const int64_t pad = rank_pad(task), cols = task.args.cols;
    PassArgs args = task.args;
    args.panels = task.both ? dot_panels[i] : nullptr;
    args.thin = thin_panels[i];
    args.steps = ceil_div(cols, pair), args.thin_steps = ceil_div(task.rows, pair);
    args.rank_pad = pad;
    for (; t0 < t1; ++t0) {
      const int64_t cc = t0 / b.row_chunks, rc = t0 % b.row_chunks, row0 = rc * b.chunk_rows, col0 = cc * kColumnChunk;
      args.dot = task.both ? dot[i] + cc * task.rows * pad * size : nullptr;
      args.outer = outer[i] + rc * cols * pad * size;
      kernels.pass(args, row0, std::min(row0 + b.chunk_rows, task.rows), col0, std::min(col0 + kColumnChunk, cols));
    }
  });
  columns.run(1 + kSerialMoves / outer_moves, [&](size_t i, int64_t i0, int64_t i1) {
    const PassTask& t = tasks[i];
    const auto sum_in = size == 8 ? sum<double> : sum<float>;
    sum_in(outer[i], blocks[i].row_chunks, t.args.cols, rank_pad(t), t.q.columns, t.outer, t.transposed, i0, i1);
  });
  rows.run(1 + kSerialMoves / dot_moves, [&](size_t i, int64_t i0, int64_t i1) {
    const PassTask& t = tasks[i];
    const auto sum_in = size == 8 ? sum<double> : sum<float>;
    sum_in(dot[i], blocks[i].column_chunks, t.rows, rank_pad(t), t.q.columns, t.dot, false, i0, i1);
  });
}

void run_expand(const Tensor& out, std::vector<ExpandTask>& tasks) {
  const LoraKernels& kernels = kernels_for(out);
  const int64_t cols = out.size(1);
  const Arena packed = panels(kernels, dtype_of(out), tasks.size(), [&](size_t i) { return &tasks[i].p; });
  const auto chunk_of = [&](const ExpandTask& task) {
    const int64_t bytes = (ceil_div(task.p.depth, pair_of(kernels.element)) + 1) * element_size(kernels.element);
    return ceil_div(kExpandBytes / bytes + 1, 1024) * 1024;
  };
  Pieces pieces(tasks.size());
  int64_t work = 1;
  for (const ExpandTask& task : tasks) {
    const int64_t chunk = chunk_of(task);
    pieces.add(ceil_div(cols, chunk) * ceil_div(task.rows, kMaxWidth));
    work = std::max(work, kMaxWidth * std::min(cols, chunk) * (task.p.depth + kPanel));
  }
  pieces.run(1 + kSerialWork / work, [&](size_t i, int64_t t0, int64_t t1) {
    const ExpandTask& task = tasks[i];
    const int64_t chunk = chunk_of(task), row_blocks = ceil_div(task.rows, kMaxWidth);
    ExpandArgs args = task.args;
    args.panels = packed[i];
    while (t0 < t1) {  // the row blocks of one column chunk at a time
      const int64_t cc = t0 / row_blocks, b0 = t0 % row_blocks, b1 = std::min(row_blocks, b0 + t1 - t0);
      kernels.expand(args, b0 * kMaxWidth, std::min(b1 * kMaxWidth, task.rows), cc * chunk,
                     std::min((cc + 1) * chunk, cols));
      t0 += b1 - b0;
    }
  });
}

}  // namespace lm
