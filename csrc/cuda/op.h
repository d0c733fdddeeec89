// What the operators of CUDA devices share in front of their kernels: checks of dtypes and devices, tensors as views,
// the current stream. torch's stable ABI alone.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "../common/checks.h"
#include "lm.cuh"

namespace lm {

constexpr const char* kServed = "float32, float16 or bfloat16";

inline bool served(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_served(const char* op, const char* argument, const Tensor& t) {
  if (!served(t.scalar_type())) bad(op, argument, kServed, dtype_text(t.scalar_type()));
}

// On the device of `like`, argument `first`.
inline void check_device(const char* op, const char* argument, const Tensor& t, const char* first, const Tensor& like) {
  if (t.is_cuda() && t.get_device_index() == like.get_device_index()) return;
  const std::string got =
      t.is_cuda() ? "device cuda:" + std::to_string(t.get_device_index()) : "another kind of device";
  bad(op, argument, "device cuda:" + std::to_string(like.get_device_index()) + " (" + first + "'s)", got);
}

// Of a tensor in a served dtype.
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Half: return DType::kHalf;
    default: return DType::kBFloat16;
  }
}

inline AnyView any_view(const Tensor& t) {
  return make_view(t.const_data_ptr(), dtype_of(t), t.stride(0), t.stride(1));
}

template <typename T>
View<const T> view(const Tensor& t) {
  return make_view(static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1));
}

// The current stream through the C shim: getCurrentStream's native handle needs torch 2.13.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lm
