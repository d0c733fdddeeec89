// Family `quant` on CUDA devices: argument checks and launches of quant.cuh's kernels. They register as lowmem_c::<op>;
// the launchers under lowmem::<op> (triton_kernels/quant.py) choose between them, Triton and cuBLAS over scratch.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

#include "../common/checks.h"
#include "op.h"
#include "quant.cuh"

namespace {

using lm::bad;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// --------------------------------------------------------------------------------------------------------- the weight

struct Packed {
  const Tensor &packed, &scale;
  const Maybe &zero, &scale_code, &scale_absmax, &scale_offset;
};

int quant_dtype(const char* op, const char* argument, const Tensor& t, bool bytes) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return lm::kFloat32;
    case ScalarType::Half: return lm::kFloat16;
    case ScalarType::BFloat16: return lm::kBFloat16;
    default: break;
  }
  if (bytes && t.scalar_type() == ScalarType::Byte) return lm::kByte;
  bad(op, argument, std::string(lm::kServed) + (bytes ? " or uint8" : ""), lm::dtype_text(t.scalar_type()));
}

// Contiguous, on like's device, with at least `count` elements.
void check_part(const char* op, const char* argument, const Tensor& t, int64_t count, const Tensor& like,
                const char* first) {
  lm::check_device(op, argument, t, first, like);
  if (t.is_contiguous() && t.numel() >= count) return;
  bad(op, argument, "at least " + std::to_string(count) + " contiguous elements",
      std::to_string(t.numel()) + (t.is_contiguous() ? " elements" : " elements with gaps"));
}

const Tensor& given(const char* op, const char* argument, const Maybe& t) {
  if (!t.has_value()) bad(op, argument, "a tensor, since the scales are doubly quantized", "None");
  return *t;
}

// A weight with `rows` rows of k columns at least: whatever a kernel reads of it is there.
lm::QuantView check_weight(const char* op, const Packed& w, int64_t code, int64_t rows, int64_t k, const Tensor& like,
                           const char* first) {
  lm::QuantView view{};
  view.spec = lm::unpack_spec(code);
  const lm::QuantSpec& spec = view.spec;
  const bool group = (spec.log2_group >= 4 && spec.log2_group <= 12) || (spec.per_row() && !spec.is_table());
  const bool second =
      spec.scale_bits == 0 || ((spec.scale_bits == 8 || (spec.scale_bits >= 2 && spec.scale_bits <= 4)) &&
                               spec.log2_scale_group >= 4 && spec.log2_scale_group <= 12);
  if (spec.format >= lm::kQuantFormats || !group || !second) bad(op, "spec", "QuantSpec.code", code);
  if (k < 0) bad(op, "k", "a size", k);
  if (!spec.is_table() && !spec.per_row() && k & ((int64_t{1} << spec.log2_group) - 1)) {
    bad(op, "k", "a multiple of the group size " + std::to_string(1 << spec.log2_group), k);
  }
  const int64_t scales = spec.scale_count(rows, k);
  lm::check_dtype(op, "packed", w.packed, ScalarType::Byte);
  check_part(op, "packed", w.packed, spec.packed_bytes(rows, k), like, first);
  if (spec.scale_bits > 0) {
    const Tensor &code_of = given(op, "scale_code", w.scale_code), &absmax = given(op, "scale_absmax", w.scale_absmax),
                 &offset = given(op, "scale_offset", w.scale_offset);
    const int64_t blocks = (scales + (int64_t{1} << spec.log2_scale_group) - 1) >> spec.log2_scale_group;
    lm::check_dtype(op, "scale", w.scale, ScalarType::Byte);
    check_part(op, "scale", w.scale, lm::row_bytes(spec.scale_bits, scales), like, first);
    lm::check_dtype(op, "scale_code", code_of, ScalarType::Float);
    check_part(op, "scale_code", code_of, int64_t{1} << spec.scale_bits, like, first);
    view.float_dtype = quant_dtype(op, "scale_absmax", absmax, false);
    check_part(op, "scale_absmax", absmax, blocks, like, first);
    lm::check_dtype(op, "scale_offset", offset, absmax.scalar_type());
    check_part(op, "scale_offset", offset, offset.numel() == 1 ? 1 : blocks, like, first);
    view.scale_code = static_cast<const float*>(code_of.const_data_ptr());
    view.scale_absmax = absmax.const_data_ptr(), view.scale_offset = offset.const_data_ptr();
    view.offset_step = offset.numel() == 1 ? 0 : 1;
  } else {
    view.float_dtype = quant_dtype(op, "scale", w.scale, false);
    check_part(op, "scale", w.scale, scales, like, first);
  }
  view.zero_dtype = lm::kByte;
  if (w.zero.has_value()) {
    if (spec.is_table()) bad(op, "zero", "None for a table format", "a tensor");
    view.zero_dtype = quant_dtype(op, "zero", *w.zero, true);
    check_part(op, "zero", *w.zero, scales, like, first);
    view.zero = w.zero->const_data_ptr();
  }
  view.packed = static_cast<const uint8_t*>(w.packed.const_data_ptr());
  view.scale = w.scale.const_data_ptr();
  view.k = k;
  return view;
}

// --------------------------------------------------------------------------------------------------------- dequantize

constexpr const char* kDequantize = "quant_dequantize_";

template <typename T>
cudaError_t dequantize_as(const lm::QuantView& w, const Tensor& out, int64_t row0, int64_t col0, cudaStream_t stream) {
  const auto view = lm::make_view(static_cast<T*>(out.mutable_data_ptr()), out.stride(0), out.stride(1));
  return lm::dequantize(w, view, out.size(0), out.size(1), row0, col0, stream);
}

void dequantize_(Tensor out, Tensor packed, Tensor scale, Maybe zero, Maybe scale_code, Maybe scale_absmax,
                 Maybe scale_offset, int64_t spec, int64_t k, int64_t row0, int64_t col0) {
  lm::check_served(kDequantize, "out", out);
  lm::check_matrix(kDequantize, "out", out, -1, -1);
  const int64_t rows = out.size(0), cols = out.size(1);
  if ((rows > 1 && out.stride(0) == 0) || (cols > 1 && out.stride(1) == 0)) {
    bad(kDequantize, "out", "elements with places of their own", "an expanded tensor");
  }
  if (row0 < 0) bad(kDequantize, "row0", "a row of the weight", row0);
  if (col0 < 0 || col0 > k - cols)
    bad(kDequantize, "col0", "out's columns inside the weight's " + std::to_string(k), col0);
  const Packed weight{packed, scale, zero, scale_code, scale_absmax, scale_offset};
  const lm::QuantView w = check_weight(kDequantize, weight, spec, row0 + rows, k, out, "out");

  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const cudaStream_t stream = lm::current_stream(out);
  cudaError_t error = cudaSuccess;
  switch (out.scalar_type()) {
    case ScalarType::Float: error = dequantize_as<float>(w, out, row0, col0, stream); break;
    case ScalarType::Half: error = dequantize_as<__half>(w, out, row0, col0, stream); break;
    default: error = dequantize_as<__nv_bfloat16>(w, out, row0, col0, stream); break;
  }
  STD_CUDA_CHECK(error);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// ------------------------------------------------------------------------------------------------------- few rows of x

struct Product {
  int64_t experts, m, n, row0;
  lm::QuantView w;
  Tensor y;
};

// The arguments of both kernels, and y; `most` rows of x in 16 bits, `most_wide` in fp32.
Product check_product(const char* op, const Tensor& x, const Packed& weight, int64_t spec, int64_t n, int64_t k,
                      int64_t row0, const Maybe& bias, bool transposed, int64_t most, int64_t most_wide) {
  lm::check_served(op, "x", x);
  if (transposed) bad(op, "transposed", "False (a product with W itself goes through scratch)", "True");
  const int64_t dims = x.dim();
  if ((dims != 2 && dims != 3) || x.size(dims - 1) != k || !x.is_contiguous()) {
    bad(op, "x", "contiguous, shape [M, " + std::to_string(k) + "] or [E, M, " + std::to_string(k) + "]",
        lm::shape_text(x));
  }
  Product p{dims == 3 ? x.size(0) : 1, x.size(dims - 2), n, row0, {}, {}};
  if (p.m > (x.scalar_type() == ScalarType::Float ? most_wide : most) || p.experts > 65535) {
    bad(op, "x",
        "at most " + std::to_string(most) + " rows (" + std::to_string(most_wide) +
            " in float32) of at most 65535 experts",
        lm::shape_text(x));
  }
  if (n < 0 || n > INT64_C(0x7FFFFF00)) bad(op, "n", "fewer than 2**31 - 256 rows of the weight", n);
  if (row0 < 0) bad(op, "row0", "a row of the weight", row0);
  p.w = check_weight(op, weight, spec, row0 + p.experts * n, k, x, "x");
  if (bias.has_value()) {
    lm::check_dtype(op, "bias", *bias, x.scalar_type());
    check_part(op, "bias", *bias, n, x, "x");
  }
  p.y = dims == 3 ? torch::stable::new_empty(x, {p.experts, p.m, n}) : torch::stable::new_empty(x, {p.m, n});
  return p;
}

constexpr const char* kGemv = "quant_gemv";

Tensor gemv(Tensor x, Tensor packed, Tensor scale, Maybe zero, Maybe scale_code, Maybe scale_absmax, Maybe scale_offset,
            int64_t spec, int64_t n, int64_t k, int64_t row0, Maybe bias, bool transposed) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Packed weight{packed, scale, zero, scale_code, scale_absmax, scale_offset};
  const Product q = check_product(kGemv, x, weight, spec, n, k, row0, bias, transposed, 8, 8);
  if (!lm::gemv_serves(q.w, k)) bad(kGemv, "packed", "an address on 16 bytes, and k a multiple of 8", k);
  const auto type = lm::dtype_of(x);
  lm::GemvArgs p{q.w,
                 lm::make_view(x.const_data_ptr(), type, k, 1),
                 q.y.mutable_data_ptr(),
                 nullptr,
                 row0,
                 k,
                 static_cast<int>(n),
                 static_cast<int>(q.m)};
  if (bias.has_value()) p.bias = bias->const_data_ptr();
  STD_CUDA_CHECK(lm::gemv(p, static_cast<int>(q.experts), lm::current_stream(x)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return q.y;
}

constexpr const char* kMma = "quant_mma";

template <typename T>
cudaError_t mma_as(const Product& q, const Tensor& x, const Maybe& bias) {
  const lm::MmaPlan plan = lm::mma_plan(q.experts, q.m, q.n, q.w.k);
  Tensor parts = torch::stable::new_empty(x, {plan.floats}, ScalarType::Float);
  lm::MmaArgs<T> p{};
  p.w = q.w, p.row0 = q.row0, p.k = q.w.k, p.n = static_cast<int>(q.n), p.m = static_cast<int>(q.m);
  p.x = static_cast<const T*>(x.const_data_ptr()), p.y = static_cast<T*>(q.y.mutable_data_ptr());
  p.bias = bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  p.parts = static_cast<float*>(parts.mutable_data_ptr());
  return lm::mma(p, static_cast<int>(q.experts), plan, lm::current_stream(x));
}

Tensor mma(Tensor x, Tensor packed, Tensor scale, Maybe zero, Maybe scale_code, Maybe scale_absmax, Maybe scale_offset,
           int64_t spec, int64_t n, int64_t k, int64_t row0, Maybe bias, bool transposed) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Packed weight{packed, scale, zero, scale_code, scale_absmax, scale_offset};
  const Product q = check_product(kMma, x, weight, spec, n, k, row0, bias, transposed, 64, 0);
  if (!lm::mma_serves(q.w, k)) bad(kMma, "packed", "an address on 16 bytes, and k a multiple of 32", k);
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16) bad(kMma, "x", "an address on 16 bytes", "another");
  STD_CUDA_CHECK(x.scalar_type() == ScalarType::Half ? mma_as<__half>(q, x, bias) : mma_as<__nv_bfloat16>(q, x, bias));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return q.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowmem_c, CUDA, m) {
  m.impl("quant_dequantize_", TORCH_BOX(&dequantize_));
  m.impl("quant_gemv", TORCH_BOX(&gemv));
  m.impl("quant_mma", TORCH_BOX(&mma));
}
