// Family `template` on the CPU: y = alpha * x. Copy to csrc/cpu/<family>.cpp (python tools/new_family.py <family>).
//
// Only torch's stable ABI may be used: torch/csrc/stable and torch/headeronly. torch/all.h and torch/extension.h would
// tie the library to one torch release, and cost a minute of compiler a file. tests/test_packaging.py reads the
// undefined symbols and fails if one of at::, c10:: or torch:: is among them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>  // needed even where no tensor method is called: its symbols are hidden
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

#include "../common/checks.h"

namespace {  // everything but the registration stays private to this file

using torch::stable::Tensor;

// Products in fp32 for 16-bit floats, otherwise in the type itself: one rounding at the end.
template <typename T>
using Accumulate = std::conditional_t<sizeof(T) == 2, float, T>;

// The kernel knows pointers, sizes and strides, no tensors. It owns rows [begin, end): parallel_for divides them, so
// the result does not depend on the number of threads.
template <typename T>
void scale_rows(const T* x, int64_t row_stride, int64_t col_stride, T* y, int64_t cols, double alpha, int64_t begin,
                int64_t end) {
  const auto factor = static_cast<Accumulate<T>>(alpha);
  for (int64_t m = begin; m < end; ++m) {  // 64-bit indices: m * row_stride passes 2**31
    for (int64_t k = 0; k < cols; ++k) {
      y[m * cols + k] = static_cast<T>(factor * static_cast<Accumulate<T>>(x[m * row_stride + k * col_stride]));
    }
  }
}

// One templated call per dtype, so that the dispatch lambda below holds no comma of its own (it is a macro's argument).
template <typename T>
void run(const Tensor& x, Tensor& y, double alpha) {
  const auto* in = static_cast<const T*>(x.const_data_ptr());  // untyped: the typed form of a half is not in torch 2.11
  auto* out = static_cast<T*>(y.mutable_data_ptr());
  const int64_t rows = x.size(0), cols = x.size(1), row_stride = x.stride(0), col_stride = x.stride(1);
  const int64_t grain =
      1 + 32768 / (cols + 1);  // rows a thread takes at least: below that a thread costs more than it gives
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    scale_rows<T>(in, row_stride, col_stride, out, cols, alpha, begin, end);
  });
}

// Arguments are checked before the first write; the form is `lowmem.<op>: <argument>: expected <what>, got <what>`.
Tensor template_scale(const Tensor& x, double alpha) {
  lm::check_floating("template_scale", "x", x);
  lm::check_matrix("template_scale", "x", x, -1, -1);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  THO_DISPATCH_V2(x.scalar_type(), "lowmem.template_scale", AT_WRAP([&] { run<scalar_t>(x, y, alpha); }),
                  AT_EXPAND(AT_FLOATING_TYPES), torch::headeronly::ScalarType::Half,
                  torch::headeronly::ScalarType::BFloat16);
  return y;
}

}  // namespace

// The schema is in lowmem/ops/<family>.py and nowhere else; here is only the kernel of the CPU key.
STABLE_TORCH_LIBRARY_IMPL(lowmem, CPU, m) { m.impl("template_scale", TORCH_BOX(&template_scale)); }
