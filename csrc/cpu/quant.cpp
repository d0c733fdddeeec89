// CPU operators of the quant family (schemas, formulas and references: lowmem/ops/quant.py): argument checks and the
// partition of the work. The loops themselves are in quant_kernels.h.
//
// A result's element is computed by one thread, in an order that depends on the shapes alone: the number of threads
// does not change a bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/quant_impl.h"

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kSerialCodes = 1 << 16;  // codes below which nothing is divided among threads

int64_t grain(int64_t codes_each) { return 1 + kSerialCodes / (codes_each + 1); }

QuantDtype float_dtype(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: bad(op, argument, "float32, bfloat16 or float16", dtype_text(t.scalar_type()));
  }
}

void check_flat(const char* op, const char* argument, const Tensor& t, int64_t least) {
  if (t.numel() < least) bad(op, argument, "at least " + std::to_string(least) + " elements", t.numel());
  if (!t.is_contiguous()) bad(op, argument, "contiguous elements", "strides");
}

// The weight of rows 0 .. rows - 1, with every tensor long enough for them.
QuantView view_of(const char* op, const Tensor& packed, const Tensor& scale, const MaybeTensor& zero,
                  const MaybeTensor& code, const MaybeTensor& absmax, const MaybeTensor& offset, int64_t spec_code,
                  int64_t rows, int64_t k) {
  QuantView w{};
  w.spec = unpack_spec(spec_code);
  w.k = k;
  const QuantSpec& spec = w.spec;
  const bool group = spec.per_row() ? !spec.is_table() : spec.log2_group >= 4 && spec.log2_group <= 12;
  if (spec_code < 0 || spec_code >> 18 || spec.format >= kQuantFormats || !group) {
    bad(op, "spec", "QuantSpec.code", spec_code);
  }
  if (k < 0 || rows < 0) bad(op, "k", "sizes of at least 0", k < 0 ? k : rows);
  if (!spec.is_table() && !spec.per_row() && k % (int64_t{1} << spec.log2_group)) {
    bad(op, "k", "a multiple of the group size " + std::to_string(1 << spec.log2_group), k);
  }
  const int64_t scales = spec.scale_count(rows, k);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_flat(op, "packed", packed, spec.packed_bytes(rows, k));
  w.packed = static_cast<const uint8_t*>(packed.data_ptr());
  w.scale = scale.data_ptr();
  if (spec.scale_bits) {
    const int bits = spec.scale_bits;
    if (!(bits == 2 || bits == 3 || bits == 4 || bits == 8) || spec.log2_scale_group < 4 ||
        spec.log2_scale_group > 12) {
      bad(op, "spec", "QuantSpec.code", spec_code);
    }
    if (!code || !absmax || !offset) bad(op, "scale_code", "scale_code, scale_absmax and scale_offset", "None");
    const int64_t blocks = (scales + (int64_t{1} << spec.log2_scale_group) - 1) >> spec.log2_scale_group;
    check_dtype(op, "scale", scale, ScalarType::Byte);
    check_flat(op, "scale", scale, row_bytes(bits, scales));
    check_dtype(op, "scale_code", *code, ScalarType::Float);
    check_flat(op, "scale_code", *code, int64_t{1} << bits);
    check_flat(op, "scale_absmax", *absmax, blocks);
    check_flat(op, "scale_offset", *offset, offset->numel() == 1 ? 1 : std::max<int64_t>(blocks, 1));
    check_dtype(op, "scale_offset", *offset, absmax->scalar_type());
    w.float_dtype = float_dtype(op, "scale_absmax", *absmax);
    w.scale_code = static_cast<const float*>(code->data_ptr());
    w.scale_absmax = absmax->data_ptr();
    w.scale_offset = offset->data_ptr();
    w.offset_step = offset->numel() > 1 ? 1 : 0;
  } else {
    check_flat(op, "scale", scale, scales);
    w.float_dtype = float_dtype(op, "scale", scale);
  }
  if (zero) {
    if (spec.is_table()) bad(op, "zero", "None for a table format", shape_text(*zero));
    check_flat(op, "zero", *zero, scales);
    w.zero_dtype = zero->scalar_type() == ScalarType::Byte ? kByte : float_dtype(op, "zero", *zero);
    w.zero = zero->data_ptr();
  }
  return w;
}

// ---------------------------------------------------------------------------------------------------------- dequantize

template <class From, class To>
void spread(const From* from, int64_t count, To* to, int64_t step) {
  for (int64_t i = 0; i < count; ++i) to[i * step] = static_cast<To>(from[i]);
}

void quant_dequantize(Tensor out, const Tensor packed, const Tensor scale, const MaybeTensor zero,
                      const MaybeTensor code, const MaybeTensor absmax, const MaybeTensor offset, int64_t spec,
                      int64_t k, int64_t row0, int64_t col0) {
  const char* op = "quant_dequantize_";
  check_matrix(op, "out", out, -1, -1);
  check_floating(op, "out", out);
  const int64_t rows = out.size(0), cols = out.size(1), ld = out.stride(0), step = out.stride(1);
  if (row0 < 0 || row0 > (int64_t{1} << 40)) bad(op, "row0", "a row of the weight", row0);
  if (col0 < 0 || col0 > k - cols) bad(op, "col0", "columns within k = " + std::to_string(k), col0);
  const QuantView w = view_of(op, packed, scale, zero, code, absmax, offset, spec, row0 + rows, k);
  if (rows == 0 || cols == 0) return;
  const ScalarType type = out.scalar_type();
  const QuantKernels& kernels = quant_kernels();
  const QuantOut form = type == ScalarType::BFloat16 ? kOutBFloat16 : type == ScalarType::Half ? kOutHalf : kOutFloat;
  const int64_t item = type == ScalarType::Double ? 8 : form == kOutFloat ? 4 : 2;
  char* data = static_cast<char*>(out.data_ptr());
  const bool direct = (step == 1 || cols == 1) && type != ScalarType::Double;
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    std::vector<float> line(direct ? 0 : cols);
    for (int64_t r = begin; r < end; ++r) {
      char* to = data + r * ld * item;
      kernels.dequantize[form](w, row0 + r, col0, cols, direct ? static_cast<void*>(to) : line.data());
      if (direct) continue;
      if (type == ScalarType::Double) {
        spread(line.data(), cols, reinterpret_cast<double*>(to), step);
      } else if (form == kOutFloat) {
        spread(line.data(), cols, reinterpret_cast<float*>(to), step);
      } else {
        spread(reinterpret_cast<uint16_t*>(line.data()), cols, reinterpret_cast<uint16_t*>(to), step);
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------- product, few rows

// fp32 [rows, cols] of any floating matrix.
std::vector<float> widened(const Tensor& x, int64_t row0, int64_t rows, int64_t cols) {
  std::vector<float> out(rows * cols);
  const int64_t ld = x.stride(0), step = x.stride(1);
  for (int64_t m = 0; m < rows; ++m) {
    float* to = out.data() + m * cols;
    const int64_t at = (row0 + m) * ld;
    if (x.scalar_type() == ScalarType::Float) {
      const float* from = static_cast<const float*>(x.data_ptr()) + at;
      for (int64_t c = 0; c < cols; ++c) to[c] = from[c * step];
    } else if (x.scalar_type() == ScalarType::BFloat16) {
      const BFloat16* from = static_cast<const BFloat16*>(x.data_ptr()) + at;
      for (int64_t c = 0; c < cols; ++c) to[c] = static_cast<float>(from[c * step]);
    } else {
      const Half* from = static_cast<const Half*>(x.data_ptr()) + at;
      for (int64_t c = 0; c < cols; ++c) to[c] = static_cast<float>(from[c * step]);
    }
  }
  return out;
}

struct Job {
  QuantView w;
  int64_t n, row0;
  bool transposed;
};

int padded_rows(int rows) { return rows <= 2 ? rows : (rows + 3) / 4 * 4; }

// sums[m, j] in fp32 for `rows` rows of x from row x0 on.
void few_rows(const Job& job, const Tensor& x, int64_t x0, int rows, float* sums, int64_t ld) {
  const QuantKernels& kernels = quant_kernels();
  const QuantView& w = job.w;
  const bool bf16 = kernels.serves16 && x.scalar_type() == ScalarType::BFloat16 && kernels.serves16(w) &&
                    (x.stride(1) == 1 || x.size(1) == 1);
  const int padded = padded_rows(rows);
  const int64_t ld_x16 = w.k + 32;  // off the cache's power-of-two strides
  const int64_t depth = job.transposed ? job.n : w.k;
  std::vector<float> wide;
  std::vector<uint16_t> x16;
  std::vector<uint32_t> pairs;
  const uint16_t* from = bf16 ? static_cast<const uint16_t*>(x.data_ptr()) + x0 * x.stride(0) : nullptr;
  if (!bf16) wide = widened(x, x0, rows, depth);
  if (job.transposed) {
    if (bf16) {
      const int64_t half = (job.n + 1) / 2;
      pairs.assign(padded * half, 0);
      for (int m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < job.n; ++i) {
          pairs[m * half + i / 2] |= static_cast<uint32_t>(from[m * x.stride(0) + i]) << (16 * (i % 2));
        }
      }
    }
    const int64_t blocks = (w.k + kOuterCols - 1) / kOuterCols;
    torch::stable::parallel_for(0, blocks, grain(job.n * kOuterCols), [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t c0 = b * kOuterCols, c1 = std::min<int64_t>(c0 + kOuterCols, w.k);
        const QuantOuter outer{w,      job.row0,  job.n, bf16 ? nullptr : wide.data(), pairs.data(), rows,
                               padded, sums + c0, ld};
        (bf16 ? kernels.outer16 : kernels.outer)(outer, c0, c1);
      }
    });
    return;
  }
  if (bf16) {
    x16.resize(padded * ld_x16);
    kernels.pack16(w, from, x.stride(0), rows, padded, ld_x16, x16.data());
  }
  const QuantDot dot{w, job.row0, bf16 ? nullptr : wide.data(), x16.data(), rows, padded, ld_x16, sums, ld};
  torch::stable::parallel_for(0, job.n, grain(w.k),
                              [&](int64_t n0, int64_t n1) { (bf16 ? kernels.dot16 : kernels.dot)(dot, n0, n1); });
}

template <class T>
void finish(const std::vector<float>& sums, int64_t rows, int64_t cols, const std::optional<std::vector<float>>& bias,
            T* y) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < cols; ++c) {
      const float sum = sums[m * cols + c];
      y[m * cols + c] = static_cast<T>(bias ? sum + (*bias)[c] : sum);
    }
  }
}

Tensor matrix_of(const Tensor& x, int64_t expert) { return x.dim() == 3 ? torch::stable::select(x, 0, expert) : x; }

Tensor quant_matmul_small(const Tensor x, const Tensor packed, const Tensor scale, const MaybeTensor zero,
                          const MaybeTensor code, const MaybeTensor absmax, const MaybeTensor offset, int64_t spec,
                          int64_t n, int64_t k, int64_t row0, const MaybeTensor bias, bool transposed) {
  const char* op = "quant_matmul_small";
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half) {
    bad(op, "x", "float32, bfloat16 or float16 (float64 is served by quant_matmul)", dtype_text(type));
  }
  const int64_t dims = x.dim(), depth = transposed ? n : k, cols = transposed ? k : n;
  if (dims < 2 || dims > 3 || x.size(dims - 1) != depth) {
    bad(op, "x", "shape [*, " + std::to_string(depth) + "], or with experts in front", shape_text(x));
  }
  const int64_t experts = dims == 3 ? x.size(0) : 1, rows = x.size(dims - 2);
  if (row0 < 0 || row0 > (int64_t{1} << 40) || n < 0) bad(op, "row0", "a row of the weight", row0);
  Job job{view_of(op, packed, scale, zero, code, absmax, offset, spec, row0 + experts * n, k), n, row0, transposed};
  std::optional<std::vector<float>> added;
  if (bias) {
    check_dtype(op, "bias", *bias, type);
    if (bias->dim() != 1 || bias->size(0) != cols)
      bad(op, "bias", std::to_string(cols) + " elements", shape_text(*bias));
    const Tensor flat = torch::stable::contiguous(*bias);
    added = widened(torch::stable::view(flat, {1, cols}), 0, 1, cols);
  }
  std::vector<int64_t> shape;
  if (dims == 3) shape.push_back(experts);
  shape.push_back(rows);
  shape.push_back(cols);
  Tensor y = torch::stable::new_empty(x, shape);
  char* out = static_cast<char*>(y.data_ptr());
  const int64_t item = type == ScalarType::Float ? 4 : 2;
  std::vector<float> sums;
  for (int64_t e = 0; e < experts && rows * cols > 0; ++e) {
    const Tensor one = matrix_of(x, e);
    job.row0 = row0 + e * n;
    for (int64_t m = 0; m < rows; m += kSmallRows) {
      const int some = static_cast<int>(std::min<int64_t>(kSmallRows, rows - m));
      char* to = out + (e * rows + m) * cols * item;
      if (type == ScalarType::Float) {
        few_rows(job, one, m, some, reinterpret_cast<float*>(to), cols);
        if (added) {
          for (int64_t i = 0; i < some * cols; ++i) reinterpret_cast<float*>(to)[i] += (*added)[i % cols];
        }
        continue;
      }
      sums.resize(some * cols);
      few_rows(job, one, m, some, sums.data(), cols);
      if (type == ScalarType::BFloat16) {
        finish(sums, some, cols, added, reinterpret_cast<BFloat16*>(to));
      } else {
        finish(sums, some, cols, added, reinterpret_cast<Half*>(to));
      }
    }
  }
  return y;
}

// ------------------------------------------------------------------------------------------------------------ quantize

std::tuple<Tensor, Tensor, Tensor> quant_quantize(const Tensor w_in, int64_t spec_code, bool zero_point,
                                                  ScalarType scale_dtype) {
  const char* op = "quant_quantize";
  check_matrix(op, "w", w_in, -1, -1);
  check_floating(op, "w", w_in);
  Tensor w = torch::stable::contiguous(w_in);
  if (w.scalar_type() == ScalarType::Double) w = torch::stable::to(w, ScalarType::Float);
  const QuantSpec spec = unpack_spec(spec_code);
  const int64_t rows = w.size(0), k = w.size(1);
  if (spec_code < 0 || spec.format >= kQuantFormats) bad(op, "spec", "QuantSpec.code", spec_code);
  if (!spec.per_row() && (spec.log2_group < 4 || spec.log2_group > 12)) bad(op, "spec", "QuantSpec.code", spec_code);
  if (spec.is_table() && (zero_point || spec.per_row())) bad(op, "zero_point", "False for a table format", zero_point);
  if (!spec.is_table() && !spec.per_row() && k % (int64_t{1} << spec.log2_group)) {
    bad(op, "w", "columns that the group size " + std::to_string(1 << spec.log2_group) + " divides", k);
  }
  const int64_t scales = spec.scale_count(rows, k), bytes = spec.packed_bytes(rows, k);
  Tensor packed = torch::stable::new_empty(w, {bytes}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(w, {scales}, scale_dtype);
  Tensor zero = torch::stable::new_empty(w, {zero_point ? scales : 0}, ScalarType::Byte);
  QuantizeArgs args{};
  args.spec = spec;
  args.w = w.data_ptr();
  args.type = w.scalar_type() == ScalarType::BFloat16 ? kOutBFloat16
              : w.scalar_type() == ScalarType::Half   ? kOutHalf
                                                      : kOutFloat;
  args.rows = rows;
  args.k = k;
  args.packed = static_cast<uint8_t*>(packed.data_ptr());
  args.scale = scale.data_ptr();
  args.float_dtype = float_dtype(op, "scale_dtype", scale);
  args.zero = zero_point ? static_cast<uint8_t*>(zero.data_ptr()) : nullptr;
  std::memset(args.packed, 0, bytes);
  const QuantKernels& kernels = quant_kernels();
  if (!spec.is_table()) {
    torch::stable::parallel_for(0, rows, grain(k),
                                [&](int64_t begin, int64_t end) { kernels.quantize(args, begin, end); });
    return {packed, scale, zero};
  }
  // threads begin at groups whose first code begins a byte (a granule): eight groups at least
  const int64_t eights = (scales + 7) / 8;
  torch::stable::parallel_for(0, eights, grain(int64_t{8} << spec.log2_group), [&](int64_t begin, int64_t end) {
    kernels.quantize(args, 8 * begin, std::min<int64_t>(8 * end, scales));
  });
  const int per = spec.bits == 3 ? kGranule : 8 / spec.bits;
  const uint32_t code_of_zero = spec.format == kNF4 ? 7u : spec.format == kNF3 ? 3u : spec.format == kNF2 ? 1u : 0u;
  for (int64_t i = rows * k; i % per; ++i) put_code(spec.bits, args.packed, i, code_of_zero);
  return {packed, scale, zero};
}

}  // namespace

const QuantKernels& quant_kernels() {
  static const QuantKernels* const kernels = [] {
    const QuantKernels* const tables[kIsaLevels] = {quant_plain(), quant_avx2(), quant_avx512(), quant_avx512_bf16()};
    return choose_isa(tables);
  }();
  return *kernels;
}

}  // namespace lm

STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) {
  m.impl("quant_dequantize_", TORCH_BOX(&lm::quant_dequantize));
  m.impl("quant_matmul_small", TORCH_BOX(&lm::quant_matmul_small));
  m.impl("quant_quantize", TORCH_BOX(&lm::quant_quantize));
}
