// From numpy to guarded memory and back.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // std::optional

#include <memory>
#include <string>

#include "cuda/lm.cuh"
#include "guarded.h"

namespace emu {

namespace py = pybind11;

// A Python tuple (values, dtype, row_stride, col_stride, place): a 2-D C-contiguous array of the elements' bits, "f32"
// | "f16" | "bf16" | "i32", strides in elements, "start" | "end". It lies in guarded memory for one call.
class Argument {
 public:
  Argument(const char* name, const py::tuple& from, bool writable)
      : values_(from[0].cast<py::array>()),
        dtype_(from[1].cast<std::string>()),
        row_stride_(from[2].cast<int64_t>()),
        col_stride_(from[3].cast<int64_t>()) {
    const Place place = from[4].cast<std::string>() == "end" ? Place::kEnd : Place::kStart;
    memory_ = std::make_unique<Guarded>(name, rows(), cols(), row_stride_, col_stride_,
                                        static_cast<size_t>(values_.itemsize()), place);
    memory_->copy_in(values_.data(), !writable);
  }

  int64_t rows() const { return values_.shape(0); }
  int64_t cols() const { return values_.shape(1); }
  const std::string& dtype() const { return dtype_; }
  void* data() const { return memory_->data(); }
  int64_t row_stride() const { return row_stride_; }

  template <typename T>
  lm::View<T> view() const {
    return lm::make_view(static_cast<T*>(data()), row_stride_, col_stride_);
  }
  lm::AnyView any_view() const {
    const lm::DType type = dtype_ == "f32"   ? lm::DType::kFloat
                           : dtype_ == "f16" ? lm::DType::kHalf
                                             : lm::DType::kBFloat16;
    return lm::make_view(data(), type, row_stride_, col_stride_);
  }
  py::array result() {
    py::array out(values_.dtype(), {rows(), cols()});
    memory_->copy_out(out.mutable_data());
    return out;
  }

 private:
  py::array values_;
  std::string dtype_;
  int64_t row_stride_, col_stride_;
  std::unique_ptr<Guarded> memory_;
};

}  // namespace emu

// `LM_BIND(m) { m.def(...); }` in bind_<family>.cpp adds to the module; module.cpp knows no family by name.
struct Binder {
  explicit Binder(void (*bind)(pybind11::module_&));
};
#define LM_BIND(m)                         \
  static void lm_bind(pybind11::module_&); \
  static const Binder lm_binder(&lm_bind); \
  static void lm_bind(pybind11::module_& m)
