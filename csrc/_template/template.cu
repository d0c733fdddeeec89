// Family `template` on CUDA devices: argument checks and the launch. Copy to csrc/cuda/<family>.cu.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "../common/checks.h"
#include "template.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
void launch(const Tensor& x, Tensor& y, double alpha, cudaStream_t stream) {
  const int64_t rows = x.size(0), cols = x.size(1);
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((rows * cols + kThreads - 1) / kThreads, 1 << 16));
  if (blocks == 0) return;  // an empty grid is a launch error
  // no <<<>>>: lm::launch is what the emulator can serve too
  STD_CUDA_CHECK(lm::launch(lm::template_scale_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream,
                            static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1),
                            static_cast<T*>(y.mutable_data_ptr()), rows, cols, static_cast<float>(alpha)));
}

Tensor template_scale(const Tensor& x, double alpha) {
  lm::check_matrix("template_scale", "x", x, -1, -1);
  const auto device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);  // the tensors' device, whatever the current one is
  void* stream = nullptr;
  // the current stream through the C shim: getCurrentStream's native handle needs torch 2.13
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  // CUDA's own 16-bit types in the kernel, which lm.cuh loads, stores and converts
  switch (x.scalar_type()) {
    case ScalarType::Float: launch<float>(x, y, alpha, static_cast<cudaStream_t>(stream)); break;
    case ScalarType::Half: launch<__half>(x, y, alpha, static_cast<cudaStream_t>(stream)); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(x, y, alpha, static_cast<cudaStream_t>(stream)); break;
    default: lm::bad("template_scale", "x", "float32, float16 or bfloat16", lm::dtype_text(x.scalar_type()));
  }
  return y;
}

}  // namespace

// lowmem_c, not lowmem: the launcher under lowmem::template_scale chooses between this and Triton
STABLE_TORCH_LIBRARY_IMPL(lowmem_c, CUDA, m) { m.impl("template_scale", TORCH_BOX(&template_scale)); }
